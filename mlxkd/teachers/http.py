"""A teacher behind an OpenAI-compatible endpoint: text, tool calls and top log-probabilities of its answers."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import openai

from mlxkd.errors import UserError

KEY_VARIABLE = "OPENAI_API_KEY"
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before a broken answer is asked for again


@dataclass(frozen=True)
class Asking:
    """How an endpoint is asked; everything that shapes an answer, and nothing else.

    Args:
        model: its name at the endpoint.
        max_tokens: longest answer.
        temperature: 0 is greedy.
        seed: sent with every request; servers that ignore it are found out by replaying.
        top_logprobs: alternatives per token to ask for; 0 asks for none.
    """

    model: str
    max_tokens: int = 1024
    temperature: float = 0.0
    seed: int = 0
    top_logprobs: int = 0


@dataclass
class Said:
    """One whole answer.

    Args:
        content: its text.
        tool_calls: ``{"function": {"name", "arguments"}}`` with arguments as an object.
        finish: the server's finish reason.
        fingerprint: the server's system fingerprint, None where it sends none.
        prompt_tokens, completion_tokens: the server's count, None where it sends none.
        logprobs: per token ``{"token", "logprob", "top": [[token, logprob], ...]}``, as asked for.
    """

    content: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None
    fingerprint: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def message(self) -> dict[str, Any]:
        """As the assistant message of a training record."""
        calls = [{"type": "function", **call} for call in self.tool_calls]
        return {"role": "assistant", "content": self.content, **({"tool_calls": calls} if calls else {})}

    def facts(self) -> dict[str, Any]:
        """Everything but the message."""
        rest = {k: v for k, v in asdict(self).items() if k not in ("content", "tool_calls")}
        return rest if self.logprobs else {k: v for k, v in rest.items() if k != "logprobs"}


class BrokenAnswer(Exception):
    """The body ended before the answer did, or a call's arguments are no JSON object."""


class HttpTeacher:
    """Asks one endpoint.

    429, 5xx, refused connections and timeouts are retried by the openai client, with exponential backoff and the
    server's Retry-After; an answer that breaks off or is no chat completion is asked for again here. Answers are not
    streamed: several servers send log-probabilities with whole answers only.

    Args:
        endpoint: base URL, such as http://localhost:8080/v1.
        asking: see ``Asking``.
        timeout: seconds for one answer.
        retries: of each kind, per request.
        sleep: waits so many seconds between broken answers.
    """

    def __init__(
        self,
        endpoint: str,
        asking: Asking,
        *,
        timeout: float = 120.0,
        retries: int = 5,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.endpoint, self.asking, self.retries, self._sleep = endpoint, asking, retries, sleep
        # Local servers want no key, but the client insists on one.
        key = os.environ.get(KEY_VARIABLE) or "none"
        self._client = openai.OpenAI(base_url=endpoint, api_key=key, timeout=timeout, max_retries=retries)

    def say(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> Said:
        """One answer to a conversation.

        Args:
            messages: ending in a user or tool message; call arguments as objects.
            tools: OpenAI tool descriptions.

        Raises:
            UserError: the endpoint refuses, cannot be reached, or breaks off more often than ``retries``.
        """
        for attempt in range(self.retries + 1):
            try:
                return self._ask(messages, tools)
            except BrokenAnswer as error:
                if attempt == self.retries:
                    raise UserError(f"{error}, {attempt + 1} times in a row", where=self.endpoint) from error
                self._sleep(min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * (0.5 + random.random() / 2))
            except openai.APIStatusError as error:
                raise UserError(
                    f"the endpoint answered {error.status_code}: {_reason(error)}", where=self.endpoint
                ) from error
            except openai.APIConnectionError as error:
                raise UserError(
                    f"the endpoint cannot be reached ({type(error.__cause__ or error).__name__})",
                    where=self.endpoint,
                    hint="is the server running?",
                ) from error
        raise AssertionError("unreachable")

    def _ask(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> Said:
        try:
            answer = self._client.chat.completions.create(**self._request(messages, tools))
        except ValueError as error:  # a body cut short is no JSON
            raise BrokenAnswer(f"the answer broke off ({type(error).__name__})") from error
        return _said(answer)

    def _request(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
        asking = self.asking
        request: dict[str, Any] = {
            "model": asking.model,
            "messages": [_outgoing(message) for message in messages],
            "max_tokens": asking.max_tokens,
            "temperature": asking.temperature,
            "seed": asking.seed,
        }
        if tools:
            request["tools"] = list(tools)
        if asking.top_logprobs:
            request |= {"logprobs": True, "top_logprobs": asking.top_logprobs}
        return request


def _said(answer: Any) -> Said:
    """The answer, whole.

    Raises:
        BrokenAnswer: parts are missing, or a call's arguments are no JSON object.
    """
    try:
        (choice, *_), usage = answer.choices, answer.usage
        said = Said(choice.message.content or "", [], choice.finish_reason, answer.system_fingerprint)
        said.tool_calls = [_call(call.function) for call in choice.message.tool_calls or ()]
    except (AttributeError, TypeError, ValueError) as error:
        raise BrokenAnswer("the endpoint sent something else than a chat completion") from error
    if said.finish is None:
        raise BrokenAnswer("the answer has no finish reason")
    if usage is not None:
        said.prompt_tokens, said.completion_tokens = usage.prompt_tokens, usage.completion_tokens
    for token in (choice.logprobs.content if choice.logprobs else None) or ():
        top = [[other.token, other.logprob] for other in token.top_logprobs or ()]
        said.logprobs.append({"token": token.token, "logprob": token.logprob, "top": top})
    return said


def _call(function: Any) -> dict[str, Any]:
    arguments = json.loads(function.arguments or "{}")
    if not isinstance(arguments, dict):
        raise BrokenAnswer(f"the arguments of {function.name} are no object")
    return {"function": {"name": function.name, "arguments": arguments}}


def _outgoing(message: dict[str, Any]) -> dict[str, Any]:
    """A message as the API wants it: arguments as JSON text, calls and results tied by an id."""
    if not message.get("tool_calls"):
        return {"tool_call_id": "call_0", **message} if message["role"] == "tool" else message
    calls = []
    for number, call in enumerate(message["tool_calls"]):
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({"id": f"call_{number}", "type": "function", **call, "function": {**function, "arguments": text}})
    return {**message, "tool_calls": calls}


def _reason(error: openai.APIStatusError) -> str:
    """What the server said, shortened; request headers, which hold the key, are never part of it."""
    said = error.response.text[:200].strip() or error.response.reason_phrase
    key = os.environ.get(KEY_VARIABLE)
    return said.replace(key, "[key]") if key else said  # a server may quote what it was sent
