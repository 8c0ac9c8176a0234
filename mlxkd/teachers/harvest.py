"""Ask an endpoint about every record of a dataset and keep its answers as training data.

Answers go to a journal beside the output, one line each as they come; a later run goes on where the last one ended.
Only a whole harvest becomes the output, in the order of the data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mlxkd.data.records import Record
from mlxkd.errors import UserError
from mlxkd.files import atomic_file
from mlxkd.teachers.http import Asking, Said


class Voice(Protocol):
    """Whoever answers a conversation; see ``HttpTeacher``."""

    asking: Asking

    def say(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> Said:
        """One answer."""
        ...


@dataclass(frozen=True)
class Budget:
    """What one run may spend: requests, and tokens by the server's count (prompts included). None is no limit."""

    requests: int | None = None
    tokens: int | None = None


@dataclass
class Harvest:
    """What a run did.

    Args:
        known: answers found in the journal.
        asked: answers of this run.
        tokens: tokens of this run by the server's count; None as soon as one answer came without a count.
        left: questions still open because the budget ran out.
        drift: questions whose replayed answer differs, with both answers.
        replayed: how many were replayed.
        fingerprints: the server's fingerprints, of this run and of the journal.
    """

    known: int = 0
    asked: int = 0
    tokens: int | None = 0
    left: int = 0
    replayed: int = 0
    drift: list[dict[str, Any]] = field(default_factory=list)
    fingerprints: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Question:
    """A conversation that waits for the teacher's answer; ``key`` names it and the way it is asked."""

    key: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]


def questions(records: Sequence[Record], asking: Asking, endpoint: str) -> list[Question]:
    """One question per record: the conversation up to its last user or tool message, or the prompt.

    Another way of asking, and another endpoint, is another question: its answer is not the journal's.

    Raises:
        UserError: a record without anything to answer; names it.
    """
    found = []
    for record in records:
        messages = list(record.messages)
        if record.kind == "completion":
            messages = [{"role": "user", "content": record.prompt}]
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise UserError("nothing to answer: no user message", where=record.source)
        text = json.dumps([endpoint, asdict(asking), messages, record.tools], sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        found.append(Question(key, tuple(messages), record.tools))
    return found


def harvest(
    voice: Voice,
    asked: Sequence[Question],
    out: Path,
    *,
    budget: Budget = Budget(),
    concurrency: int = 4,
    replay: int = 0,
    on_answer: Callable[[int, int], None] | None = None,
) -> Harvest:
    """Answer every question once; write ``out`` when all are answered.

    Args:
        voice: the teacher.
        asked: a question that occurs twice is asked once.
        out: JSON lines of ``{"messages", "tools", "teacher"}``; its journal is ``out`` with ``.journal`` appended.
        budget: for this run; a request in flight when it runs out is still kept.
        concurrency: requests at a time.
        replay: so many answers are asked for again, evenly spread, and compared.
        on_answer: called with (done, total).

    Raises:
        UserError: from the teacher; what has been answered is in the journal.
    """
    journal = Journal(out.with_name(out.name + ".journal"))
    unique = list({question.key: question for question in asked}.values())
    found = Harvest(known=sum(q.key in journal.answers for q in unique))
    open_questions = [q for q in unique if q.key not in journal.answers]
    with ThreadPoolExecutor(concurrency) as pool, journal:
        for question, said in _answers(
            voice, open_questions, pool, concurrency, lambda running: _spent(found, running, budget)
        ):
            journal.add(question, said)
            found.asked += 1
            found.tokens = _sum(found.tokens, said)
            if on_answer:
                on_answer(found.known + found.asked, len(unique))
        found.left = len(open_questions) - found.asked
        if replay and not found.left:
            _replay(voice, unique, journal, pool, replay, found)
    found.fingerprints = {f for line in journal.answers.values() if (f := line["teacher"].get("fingerprint"))}
    if not found.left:
        with atomic_file(out) as temporary:
            lines = (json.dumps(journal.answers[q.key], ensure_ascii=False) + "\n" for q in unique)
            temporary.write_text("".join(lines), encoding="utf-8")
        journal.path.unlink(missing_ok=True)
    return found


class Journal:
    """Answers by question, appended line by line; a last line cut short by a crash is dropped."""

    def __init__(self, path: Path):
        self.path = path
        self.answers: dict[str, dict[str, Any]] = {}
        whole = 0
        if path.exists():
            for line in path.read_bytes().split(b"\n")[:-1]:
                try:
                    entry = json.loads(line)
                    self.answers[entry["teacher"]["key"]] = entry
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        "this journal is damaged", where=f"{path}: byte {whole}", hint="remove the file to start anew"
                    ) from error
                whole += len(line) + 1
        self._whole = whole

    def __enter__(self) -> Journal:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        self._file.truncate(self._whole)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, question: Question, said: Said) -> None:
        """Write one answer through to the disk."""
        entry = {
            "messages": [*question.messages, said.message()],
            "tools": list(question.tools),
            "teacher": {"key": question.key, **said.facts()},
        }
        self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.answers[question.key] = entry


def _answers(
    voice: Voice, waiting: Sequence[Question], pool: ThreadPoolExecutor, concurrency: int, stop: Callable[[int], bool]
) -> Iterator[tuple[Question, Said]]:
    """Answers as they come, from ``concurrency`` requests in flight at most; none starts once ``stop(in flight)``."""
    rest = iter(waiting)
    running: dict[Future[Said], Question] = {}
    fault: BaseException | None = None
    while True:
        while fault is None and len(running) < concurrency and not stop(len(running)):
            question = next(rest, None)
            if question is None:
                break
            running[pool.submit(voice.say, question.messages, question.tools)] = question
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            question = running.pop(future)
            if error := future.exception():
                fault = fault or error  # what is in flight is still kept
            else:
                yield question, future.result()
    if fault is not None:
        raise fault


def _spent(found: Harvest, running: int, budget: Budget) -> bool:
    if budget.requests is not None and found.asked + running >= budget.requests:
        return True
    if budget.tokens is None:
        return False
    if found.tokens is None:
        raise UserError("this endpoint counts no tokens, so a token budget cannot be kept", hint="use --max-requests")
    return found.tokens >= budget.tokens


def _sum(before: int | None, said: Said) -> int | None:
    if before is None or said.prompt_tokens is None or said.completion_tokens is None:
        return None
    return before + said.prompt_tokens + said.completion_tokens


def _replay(
    voice: Voice, unique: Sequence[Question], journal: Journal, pool: ThreadPoolExecutor, count: int, found: Harvest
) -> None:
    """Ask some questions again and note where the answer is another."""
    step = max(1, len(unique) // count)
    chosen = unique[::step][:count]
    for question, said in zip(chosen, pool.map(lambda q: voice.say(q.messages, q.tools), chosen), strict=True):
        kept = journal.answers[question.key]
        found.replayed += 1
        if kept["messages"][-1] != said.message() or kept["teacher"].get("fingerprint") != said.fingerprint:
            found.drift.append(
                {
                    "key": question.key,
                    "first": kept["messages"][-1],
                    "again": said.message(),
                    "fingerprints": [kept["teacher"].get("fingerprint"), said.fingerprint],
                }
            )
