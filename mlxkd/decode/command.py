"""The body of ``mlxkd generate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mlxkd.decode.constrained import ToolGrammar
from mlxkd.decode.divergence import first_divergence
from mlxkd.decode.engine import Engine, Statistics
from mlxkd.decode.generate import Completion, collect, complete
from mlxkd.decode.opening import CacheFile, Worker, draft_length, open_drafter, open_worker, rows_for
from mlxkd.decode.requests import Constraint, Event, GenerateOptions, Request
from mlxkd.decode.sampling import SamplingOptions
from mlxkd.decode.tokens import Prompts, read_tools
from mlxkd.errors import UserError

EPILOG = """\b
Examples:
  mlxkd generate runs/demo/student "What is the weather in Oslo?" --stream
  mlxkd generate model "" --raw --max-tokens 50
  mlxkd generate model --batch prompts.jsonl --json
  mlxkd generate teacher "Book a table" --tools tools.json --constrain --draft student
"""
FILE = click.Path(path_type=Path)


def make_command() -> click.Command:
    """The click command."""

    @click.command("generate", epilog=EPILOG, short_help="Answer a prompt, a conversation or a batch.")
    @click.argument("model", metavar="MODEL_OR_BUNDLE")
    @click.argument("prompt", required=False)
    @click.option("--tools", type=FILE, help="JSON list of tools [default: the model's own]")
    @click.option("--constrain", is_flag=True, help="Only calls that parse and fit their schema")
    @click.option("--draft", metavar="MODEL", help='Speculate with this drafter, or "ngram" for prompt lookup')
    @click.option("--draft-tokens", type=click.IntRange(0), help="Tokens per draft [default: adapts]")
    @click.option("--check-drafts", is_flag=True, help="Decode again without drafts and compare; greedy only")
    @click.option("--prompt-cache", type=FILE, help="Keep processed prompts in this file")
    @click.option("--cache-mb", type=click.IntRange(1), default=1024, show_default=True, help="Budget of the cache")
    @click.option("--batch", type=FILE, help='JSON lines: {"prompt": ...} or {"messages": [...]}')
    @click.option("--workload", type=click.Choice(["offline", "interactive"]), default="offline", show_default=True)
    @click.option("--rows", type=click.IntRange(1), help="Rows decoded together [default: measured once]")
    @click.option("--backend", type=click.Choice(["auto", "mil", "coreml"]), default="auto", help="For bundles")
    @click.option("--raw", is_flag=True, help="No chat template: continue the prompt as plain text")
    @click.option("--stream", is_flag=True, help="Print text as it comes")
    @click.option("--json", "as_json", is_flag=True, help="Print JSON: one object per answer, with --stream per token")
    @click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True)
    @click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy")
    @click.option("--top-k", type=int, default=0, help="0 keeps all")
    @click.option("--top-p", type=float, default=1.0)
    @click.option("--min-p", type=float, default=0.0)
    @click.option("--repetition-penalty", type=float, default=1.0)
    @click.option("--seed", type=int, default=0, show_default=True)
    def command(**given: Any) -> None:
        """Decode with a model folder, a Hugging Face repository or a converted bundle."""
        run(given)

    return command


def run(given: dict[str, Any]) -> None:
    """Answer what the command line asks; see ``mlxkd generate --help``.

    Raises:
        UserError: neither a prompt nor a batch, or both; files that cannot be read.
    """
    if (given["prompt"] is None) == (given["batch"] is None):
        raise UserError("give either a PROMPT or --batch FILE")
    items = read_batch(given["batch"]) if given["batch"] else [{"prompt": given["prompt"]}]
    worker = open_worker(given["model"], given["backend"])
    tools = _tools(worker, given)
    requests = _requests(worker, items, tools, given)
    rows = given["rows"] or _rows(worker, requests, given)
    session = worker.session(min(rows, len(requests)))
    if given["constrain"]:
        grammar: Constraint = ToolGrammar(worker.tokenizer, tools or [], session.vocab_size)
        requests = [Request(r.prompt, _options(given, grammar), r.name) for r in requests]
    kept = CacheFile(given["prompt_cache"], worker, session, given["cache_mb"] << 20) if given["prompt_cache"] else None
    if kept is not None and kept.stale:
        click.echo(f"prompt cache not used: {kept.stale}", err=True)
    drafter = open_drafter(given["draft"], worker, session.batch_size, given["constrain"] and session.can_rewind)
    length = draft_length(given["draft_tokens"], session) if drafter is not None else None
    if given["check_drafts"] and (drafter is None or given["temperature"] != 0):
        raise UserError("--check-drafts compares greedy texts with and without --draft", hint="drop --temperature")
    engine = Engine(session, worker.tokenizer, drafter=drafter, length=length, cache=kept.store if kept else None)
    answers = _show(engine, requests, given)
    if kept is not None:
        kept.save()
    if given["check_drafts"] and not _drafts_hold(worker, requests, answers, 1 + len(engine.statistics.drafted_at)):
        sys.exit(1)


def _drafts_hold(worker: Worker, requests: Sequence[Request], answers: dict[str, Completion], width: int) -> bool:
    """Decode again, token by token; say where a text differs. False where rounding cannot explain it."""
    session = worker.session(1)
    engine = Engine(session, worker.tokenizer)
    found = []
    for request in requests:
        plain = complete(engine, request.prompt, request.options).tokens
        found.append(first_divergence(session, request.prompt, plain, answers[request.name].tokens, width))
    for request, difference in zip(requests, found, strict=True):
        if difference is not None:
            click.echo(f"answer {request.name}: {difference}", err=True)
    equal = sum(difference is None for difference in found)
    click.echo(f"{equal} answer{' equals' if equal == 1 else 's equal'} plain decoding", err=True)
    return all(difference is None or difference.within_noise for difference in found)


def _show(engine: Engine, requests: Sequence[Request], given: dict[str, Any]) -> dict[str, Completion]:
    if given["stream"]:
        events = []
        for event in engine.run(requests):
            _show_event(event, given["as_json"])
            events.append(event)
        if not given["as_json"]:
            click.echo()
        return collect(events)
    answers = collect(engine.run(requests))
    for request in requests:
        _show_answer(answers[request.name], request, engine.statistics, given)
    return answers


def read_batch(path: Path) -> list[dict[str, Any]]:
    """Prompts or conversations, one JSON object per line.

    Raises:
        UserError: names the file and line at fault.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(path)) from error
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise UserError(f"not JSON: {error}", where=f"{path}:{number}") from error
        if not isinstance(item, dict) or not (
            isinstance(item.get("prompt"), str) ^ isinstance(item.get("messages"), list)
        ):
            raise UserError('expected either "prompt" or "messages"', where=f"{path}:{number}")
        items.append(item)
    if not items:
        raise UserError("no prompts", where=str(path))
    return items


def _rows(worker: Worker, requests: Sequence[Request], given: dict[str, Any]) -> int:
    choice = rows_for(given["workload"], worker, requests)
    if len(requests) > 1:
        click.echo(choice.explanation, err=True)
    return choice.batch


def _options(given: dict[str, Any], constraint: Constraint | None = None) -> GenerateOptions:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    sampling = SamplingOptions(**{name: given[name] for name in names})
    return GenerateOptions(given["max_tokens"], sampling, constraint=constraint)


def _tools(worker: Worker, given: dict[str, Any]) -> list[dict[str, Any]] | None:
    shipped = worker.folder / "tools.json"
    path = given["tools"] or (shipped if shipped.is_file() else None)
    return read_tools(path) if path else None


def _requests(
    worker: Worker, items: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None, given: dict[str, Any]
) -> list[Request]:
    prompts, options = Prompts(worker.tokenizer), _options(given)
    if given["raw"]:
        if any("messages" in item for item in items):
            raise UserError("conversations need the chat template", hint="drop --raw")
        found = prompts.raw_batch([item["prompt"] for item in items])
    else:
        found = [
            prompts.chat(
                item.get("messages") or [{"role": "user", "content": item["prompt"]}], item.get("tools") or tools
            )
            for item in items
        ]
    return [Request(tokens, options, str(i)) for i, tokens in enumerate(found)]


def _show_event(event: Event, as_json: bool) -> None:
    if as_json:
        fields = {"request": event.request, "token": event.token, "text": event.text, "finish": event.finish}
        click.echo(json.dumps({**fields, "logprob": event.logprob, "drafted": event.drafted}, ensure_ascii=False))
    else:
        click.echo(event.text, nl=False)


def _show_answer(answer: Completion, request: Request, statistics: Statistics, given: dict[str, Any]) -> None:
    if not given["as_json"]:
        click.echo(answer.text)
        return
    shown: dict[str, Any] = {
        "request": request.name,
        "text": answer.text,
        "finish": answer.finish,
        "tokens": list(answer.tokens),
        "prompt_tokens": len(request.prompt),
    }
    if given["batch"] is None:
        rates = {
            "tokens_per_forward": statistics.tokens_per_forward,
            "acceptance_rate": statistics.acceptance_rate,
        }
        shown["statistics"] = asdict(statistics) | rates
    click.echo(json.dumps(shown, ensure_ascii=False))
