"""What is asked of a target: four workloads, or a file of records of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.results import Workload, content_hash
from mlxkd.errors import UserError, unknown

WORDS = "the quick brown fox counts seven small boats near a quiet harbour while rain falls on the old town "


def _tool(name: str, about: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": schema}}


TOOLS = (
    _tool("get_weather", "Weather of a city on a day.", city="string", day="string"),
    _tool("set_timer", "Start a timer.", minutes="integer"),
    _tool("convert_currency", "Convert an amount of money.", amount="number", source="string", target="string"),
    _tool("find_train", "Find a train connection.", origin="string", destination="string", time="string"),
)
QUESTIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("What will the weather be in Oslo tomorrow?", "get_weather", {"city": "Oslo", "day": "tomorrow"}),
    ("Set a timer for 12 minutes.", "set_timer", {"minutes": 12}),
    ("How much is 80 EUR in USD?", "convert_currency", {"amount": 80, "source": "EUR", "target": "USD"}),
    ("A train from Bern to Basel at 9:30, please.", "find_train",
     {"origin": "Bern", "destination": "Basel", "time": "9:30"}),
    ("Will it rain in Lima on Sunday?", "get_weather", {"city": "Lima", "day": "Sunday"}),
    ("Wake me in 45 minutes.", "set_timer", {"minutes": 45}),
    ("Turn 15 GBP into JPY.", "convert_currency", {"amount": 15, "source": "GBP", "target": "JPY"}),
    ("I need to get from Kyoto to Osaka at 18:00.", "find_train",
     {"origin": "Kyoto", "destination": "Osaka", "time": "18:00"}),
)  # fmt: skip
SYSTEM = "You are a careful assistant. " + 6 * "Use a tool whenever one fits, and answer briefly otherwise. "


@dataclass(frozen=True)
class Case:
    """One request: a conversation, the tools on offer, and the expected answer where it is known."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    expected: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """The last message as plain text, for models without a chat template."""
        return str(self.messages[-1].get("content") or "")


@dataclass(frozen=True)
class Load:
    """A workload.

    Args:
        queue: all requests wait from the start (offline); otherwise each is sent when a row is free.
        cached: prompts share a prefix, and a prompt cache is in use.
        max_tokens: new tokens at most per request.
    """

    name: str
    cases: tuple[Case, ...]
    max_tokens: int
    queue: bool = False
    cached: bool = False

    def identity(self, **settings: Any) -> Workload:
        """Name, hash of everything that shapes the figures, and the settings in words."""
        settings = {"max_tokens": self.max_tokens, "requests": len(self.cases), **settings}
        content = [[c.messages, c.tools] for c in self.cases]
        return Workload(
            name=self.name, hash=content_hash([content, self.queue, self.cached, settings]), settings=settings
        )


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def _asked(system: str = "") -> tuple[Case, ...]:
    head = ({"role": "system", "content": system},) if system else ()
    return tuple(Case((*head, {"role": "user", "content": q}), TOOLS, _call(n, a)) for q, n, a in QUESTIONS)


def _long(words: int) -> tuple[Case, ...]:
    text = (WORDS * (words // 15 + 1)).split()[:words]
    return tuple(Case(({"role": "user", "content": f"{n} " + " ".join(text)},)) for n in range(4))


def names() -> tuple[str, ...]:
    """The workloads that exist."""
    return ("interactive", "offline", "prefill", "shared-prefix")


def load(name: str, *, max_tokens: int = 64, requests: int | None = None, records: str | Path | None = None) -> Load:
    """A workload by name.

    Args:
        max_tokens: new tokens at most per request.
        requests: how many; the workload's cases are repeated or cut to it.
        records: a file of conversations that replaces the cases.

    Raises:
        UserError: an unknown name, or a file that is none.
    """
    if name not in names():
        raise unknown("workload", name, names())
    cases = {
        "interactive": lambda: _asked(),
        "offline": lambda: _asked() * 2,
        "prefill": lambda: _long(240),
        "shared-prefix": lambda: _asked(SYSTEM),
    }[name]()
    if records:
        cases = from_records(records)
    if requests:
        cases = tuple(cases[i % len(cases)] for i in range(requests))
    tokens = 1 if name == "prefill" else max_tokens
    return Load(name, cases, tokens, queue=name == "offline", cached=name == "shared-prefix")


def from_records(path: str | Path) -> tuple[Case, ...]:
    """Cases from records: the last assistant message of a conversation is the expected answer."""
    from mlxkd.data.records import load_records

    found = []
    for record in load_records(path):
        messages: Sequence[dict[str, Any]] = record.messages
        if record.kind != "messages":
            messages = ({"role": "user", "content": record.prompt or record.text},)
        expected = messages[-1] if messages[-1].get("role") == "assistant" else None
        asked = messages[:-1] if expected else messages
        if not asked:
            raise UserError("a conversation without a question", where=record.source)
        found.append(Case(tuple(asked), tuple(record.tools), expected))
    return tuple(found)
