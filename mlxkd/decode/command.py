"""The body of ``mlxkd generate``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mlxkd import compat
from mlxkd.decode.engine import Engine, Statistics
from mlxkd.decode.generate import Completion, collect
from mlxkd.decode.mlx_session import MlxSession
from mlxkd.decode.requests import Event, GenerateOptions, Request
from mlxkd.decode.sampling import SamplingOptions
from mlxkd.decode.session import Session
from mlxkd.decode.tokens import Prompts, read_tools
from mlxkd.errors import UserError

OpenBundle = Callable[[Path, int], Session]
"""Opens a converted bundle with so many rows."""

EPILOG = """\b
Examples:
  mlxkd generate runs/demo/student "What is the weather in Oslo?" --stream
  mlxkd generate model "" --raw --max-tokens 50
  mlxkd generate model --batch prompts.jsonl --json
"""


@dataclass(frozen=True)
class Opened:
    """A worker ready to decode."""

    session: Session
    tokenizer: Any
    folder: Path


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a converted bundle rather than a model folder."""
    return (folder / "manifest.json").is_file()


def open_worker(name: str, batch_size: int, open_bundle: OpenBundle | None) -> Opened:
    """A session and its tokenizer for a model folder, a repository or a bundle.

    Raises:
        UserError: nothing of that name, or a bundle without a runtime for it.
    """
    folder = Path(name).expanduser()
    if is_bundle(folder):
        if open_bundle is None:
            raise UserError("this is a converted bundle and no runtime for it is installed", where=name)
        return Opened(open_bundle(folder, batch_size), compat.load_tokenizer(folder, {}), folder)
    folder = compat.resolve_model(name)
    model, tokenizer, config = compat.load(folder)
    return Opened(MlxSession(model, config, batch_size=batch_size), tokenizer, folder)


def make_command(open_bundle: OpenBundle | None = None) -> click.Command:
    """The click command; ``open_bundle`` connects the runtime of converted bundles."""

    @click.command("generate", epilog=EPILOG, short_help="Answer a prompt, a conversation or a batch.")
    @click.argument("model", metavar="MODEL_OR_BUNDLE")
    @click.argument("prompt", required=False)
    @click.option("--tools", type=click.Path(path_type=Path), help="JSON list of tools [default: the model's own]")
    @click.option("--batch", type=click.Path(path_type=Path), help='JSON lines: {"prompt": ...} or {"messages": [...]}')
    @click.option("--rows", type=click.IntRange(1), default=4, show_default=True, help="Rows decoded together")
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
        run(open_bundle, **given)

    return command


def run(open_bundle: OpenBundle | None, **given: Any) -> None:
    """Answer what the command line asks; see ``mlxkd generate --help``.

    Raises:
        UserError: neither a prompt nor a batch, or both; files that cannot be read.
    """
    if (given["prompt"] is None) == (given["batch"] is None):
        raise UserError("give either a PROMPT or --batch FILE")
    items = read_batch(given["batch"]) if given["batch"] else [{"prompt": given["prompt"]}]
    opened = open_worker(given["model"], min(given["rows"], len(items)), open_bundle)
    options = _options(given)
    prompts = _prompts(opened, items, given)
    engine = Engine(opened.session, opened.tokenizer)
    requests = [Request(tokens, options, str(i)) for i, tokens in enumerate(prompts)]
    events = engine.run(requests)
    if given["stream"]:
        for event in events:
            _show_event(event, given["as_json"])
        if not given["as_json"]:
            click.echo()
        return
    answers = collect(events)
    for request in requests:
        _show_answer(answers[request.name], request, engine.statistics, given)


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


def _options(given: dict[str, Any]) -> GenerateOptions:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return GenerateOptions(given["max_tokens"], SamplingOptions(**{name: given[name] for name in names}))


def _prompts(opened: Opened, items: Sequence[dict[str, Any]], given: dict[str, Any]) -> list[tuple[int, ...]]:
    prompts = Prompts(opened.tokenizer)
    if given["raw"]:
        if any("messages" in item for item in items):
            raise UserError("conversations need the chat template", hint="drop --raw")
        return prompts.raw_batch([item["prompt"] for item in items])
    shipped = opened.folder / "tools.json"
    path = given["tools"] or (shipped if shipped.is_file() else None)
    tools = read_tools(path) if path else None
    found = []
    for item in items:
        messages = item.get("messages") or [{"role": "user", "content": item["prompt"]}]
        found.append(prompts.chat(messages, item.get("tools") or tools))
    return found


def _show_event(event: Event, as_json: bool) -> None:
    if as_json:
        fields = {"request": event.request, "token": event.token, "text": event.text, "finish": event.finish}
        click.echo(json.dumps({**fields, "logprob": event.logprob}, ensure_ascii=False))
    else:
        click.echo(event.text, nl=False)


def _show_answer(answer: Completion, request: Request, statistics: Statistics, given: dict[str, Any]) -> None:
    if not given["as_json"]:
        click.echo(answer.text)
        return
    shown = {
        "request": request.name,
        "text": answer.text,
        "finish": answer.finish,
        "tokens": list(answer.tokens),
        "prompt_tokens": len(request.prompt),
        "tokens_per_forward": statistics.tokens_per_forward,
    }
    click.echo(json.dumps(shown, ensure_ascii=False))
