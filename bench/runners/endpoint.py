"""An OpenAI-compatible endpoint. Bytes are stamped when they arrive, before any parsing.

A chunk is not a token: tokens come from the server's own count, and what needs a time per token (inter-token
latency, tokens to the first call) is left out rather than guessed from chunks.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bench.runners._job import Job, Outcome
from bench.workloads import Case, Load
from mlxkd.errors import UserError
from mlxkd.evaluation.toolcalls import schema
from mlxkd.evaluation.toolcalls.parsing import Call
from mlxkd.evaluation.toolcalls.scoring import same_calls


@dataclass
class Reply:
    """One streamed answer; times in seconds since the request was sent."""

    text: str = ""
    calls: dict[int, dict[str, str]] = field(default_factory=dict)
    first: float | None = None
    last: float | None = None
    valid: float | None = None
    tokens: int | None = None
    prompt_tokens: int | None = None
    fingerprint: str | None = None

    def parsed(self) -> list[Call]:
        """The calls whose arguments are complete JSON objects."""
        found = []
        for entry in self.calls.values():
            try:
                arguments = json.loads(entry["arguments"] or "{}")
            except ValueError:
                continue
            if isinstance(arguments, dict):
                found.append(Call(entry["name"], arguments))
        return found

    def answer(self) -> str:
        """Text and calls as one string, to compare answers with."""
        calls = [[c.name, c.arguments] for c in self.parsed()]
        return self.text + (json.dumps(calls, sort_keys=True) if calls else "")


def lines(chunks: Iterator[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Whole lines of a byte stream, each with the time at which its last byte arrived."""
    rest = b""
    for at, chunk in chunks:
        rest += chunk
        *whole, rest = rest.split(b"\n")
        for line in whole:
            yield at, line.rstrip(b"\r")


def take(reply: Reply, at: float, line: bytes, tools: tuple[dict[str, Any], ...]) -> None:
    """Read one line of the event stream into the reply; keep-alives and the end marker carry nothing.

    Raises:
        UserError: a data line that is not JSON.
    """
    if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
        return
    try:
        event = json.loads(line[5:])
    except ValueError as error:
        raise UserError(f"the endpoint sent a line that is not JSON: {line[:80]!r}") from error
    usage = event.get("usage") or {}
    reply.tokens = usage.get("completion_tokens", reply.tokens)
    reply.prompt_tokens = usage.get("prompt_tokens", reply.prompt_tokens)
    reply.fingerprint = event.get("system_fingerprint") or reply.fingerprint
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        text = (delta.get("content") or choice.get("text") or "") + str(delta.get("reasoning_content") or "")
        calls = delta.get("tool_calls") or ()
        if not text and not calls:
            continue  # a chunk that only names the role is no token
        reply.first = at if reply.first is None else reply.first
        reply.last = at
        reply.text += text
        for position, call in enumerate(calls):
            entry = reply.calls.setdefault(call.get("index", position), {"name": "", "arguments": ""})
            function = call.get("function") or {}
            entry["name"] += function.get("name") or ""
            entry["arguments"] += function.get("arguments") or ""
        if calls and reply.valid is None and any(schema.fault(c, tools) is None for c in reply.parsed()):
            reply.valid = at


class Endpoint:
    """A server and its model."""

    def __init__(self, location: str, model: str | None, seed: int):
        self.base = location.rstrip("/").removesuffix("/chat/completions")
        self.model, self.seed = model or self._only_model(), seed

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        data = None if body is None else json.dumps(body).encode()
        try:
            return urllib.request.urlopen(urllib.request.Request(f"{self.base}{path}", data, headers), timeout=600)
        except urllib.error.HTTPError as error:
            said = error.read()[:200].decode(errors="replace")
            raise UserError(f"the endpoint answered {error.code}: {said}", where=self.base) from error
        except OSError as error:
            raise UserError(
                f"the endpoint cannot be reached ({type(error).__name__})",
                where=self.base,
                hint="is the server running?",
            ) from error

    def _only_model(self) -> str:
        with self._open("/models") as response:
            try:
                return str(json.load(response)["data"][0]["id"])
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise UserError(
                    "no model list at this endpoint",
                    where=self.base,
                    hint="name the model with --model (mlx_lm.server knows its own as default_model)",
                ) from error

    def ask(self, case: Case, load: Load) -> Reply:
        """One streamed request."""
        body: dict[str, Any] = {
            "model": self.model, "messages": list(case.messages), "max_tokens": load.max_tokens, "temperature": 0.0,
            "top_p": 1.0, "seed": self.seed, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        if case.tools:
            body["tools"] = list(case.tools)
        reply, started = Reply(), time.perf_counter()
        try:
            with self._open("/chat/completions", body) as response:
                for at, line in lines(_stamped(response, started)):
                    take(reply, at, line, case.tools)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"the endpoint broke off: {type(error).__name__}", where=self.base) from error
        return reply


def _stamped(response: Any, started: float) -> Iterator[tuple[float, bytes]]:
    """Bytes as they come, with the time of their arrival."""
    while chunk := response.read1(1 << 16):
        yield time.perf_counter() - started, chunk


def samples(replies: list[Reply], cases: tuple[Case, ...]) -> dict[str, list[float | None]]:
    """Series of a round; a call that never came is None."""
    found: dict[str, list[float | None]] = {
        "ttft_ms": [None if r.first is None else r.first * 1e3 for r in replies],
        "request_ms": [None if r.last is None else r.last * 1e3 for r in replies],
        "tpot_ms": [], "tps": [], "ttfa_ms": [],
    }  # fmt: skip
    for reply, case in zip(replies, cases, strict=True):
        if reply.tokens and reply.tokens > 1 and reply.first is not None and reply.last and reply.last > reply.first:
            found["tpot_ms"].append((reply.last - reply.first) * 1e3 / (reply.tokens - 1))
            found["tps"].append((reply.tokens - 1) / (reply.last - reply.first))
        if (case.expected or {}).get("tool_calls"):
            found["ttfa_ms"].append(None if reply.valid is None else reply.valid * 1e3)
    return {name: values for name, values in found.items() if values}


def run(job: Job) -> Outcome:
    """Ask every case in turn; further passes repeat them for determinism."""
    load, endpoint = job.load(), Endpoint(job.location, job.model, job.seed)
    endpoint.ask(load.cases[0], load)  # warm-up
    started = time.perf_counter()
    replies = [endpoint.ask(case, load) for case in load.cases]
    wall = time.perf_counter() - started
    passes = [[r.answer() for r in replies]]
    prints = {r.fingerprint for r in replies}
    for _ in range(job.passes - 1):
        again = [endpoint.ask(case, load) for case in load.cases]
        prints |= {r.fingerprint for r in again}
        passes.append([r.answer() for r in again])
    made = [r.tokens for r in replies if r.tokens is not None]
    counters: dict[str, float | None] = {"throughput": sum(made) / wall if len(made) == len(replies) else None}
    return Outcome(
        samples=samples(replies, load.cases), counters=counters, answers=passes[0], passes=passes,
        scores=scores(load.cases, replies), device=f"endpoint {endpoint.base}", backend=f"endpoint {endpoint.model}",
        details={"fingerprints": sorted(map(str, prints))},
    )  # fmt: skip


def scores(cases: tuple[Case, ...], replies: list[Reply]) -> dict[str, list[float]]:
    """Exactness of the calls where the answer is known."""
    if any(case.expected is None for case in cases):
        return {}
    from mlxkd.evaluation.toolcalls.scoring import expected_calls

    pairs = [(r.parsed(), expected_calls(c.expected or {}), c.tools) for r, c in zip(replies, cases, strict=True)]
    return {
        "call_exact": [float(same_calls(made, wanted)) for made, wanted, _ in pairs],
        "schema_valid": [float(bool(made) and all(schema.fault(c, t) is None for c in made)) for made, _, t in pairs],
        "name_ok": [float(sorted(c.name for c in m) == sorted(c.name for c in w)) for m, w, _ in pairs],
    }


def drift(passes: list[list[str]]) -> tuple[float, int | None]:
    """(share of requests whose answers agree in all passes, first differing request)."""
    same = [len(set(answers)) == 1 for answers in zip(*passes, strict=True)]
    return sum(same) / len(same), next((i for i, equal in enumerate(same) if not equal), None)
