"""The endpoint teacher: a real mlx_lm.server, and a server that fails in every way a server can."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from model_server import model_server

from mlxkd.cli import main
from mlxkd.data.records import Record, load_records
from mlxkd.errors import UserError
from mlxkd.teachers.harvest import Budget, Journal, harvest, questions
from mlxkd.teachers.http import Asking, HttpTeacher

SECRET = "sk-never-to-be-seen"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


class Server:
    """Answers "echo: <last user text>"; ``faults`` are played first, one per request."""

    def __init__(self, faults: list[str] | None = None, usage: bool = True, fingerprint: str = "fp_1"):
        self.faults, self.usage, self.fingerprint = list(faults or ()), usage, fingerprint
        self.requests: list[dict[str, Any]] = []
        self.in_flight = self.most_in_flight = 0
        self.delay = 0.0
        self.retry_after = "0"
        self.tool_call: dict[str, str] | None = None
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.requests.append({**body, "key": self.headers["Authorization"], "at": time.monotonic()})
                    fault = outer.faults.pop(0) if outer.faults else ""
                    outer.in_flight += 1
                    outer.most_in_flight = max(outer.most_in_flight, outer.in_flight)
                try:
                    time.sleep(outer.delay)
                    self.answer(body, fault)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client has given up on a slow answer
                finally:
                    with outer._lock:
                        outer.in_flight -= 1

            def answer(self, body: dict[str, Any], fault: str) -> None:
                self.close_connection = True
                if fault.isdigit():
                    self.send_response(int(fault))
                    self.send_header("Retry-After", outer.retry_after)
                    said = f"busy {self.headers['Authorization']}".encode()  # some servers quote the key
                    self.send_header("Content-Length", str(len(said)))
                    self.end_headers()
                    self.wfile.write(said)
                    return
                if fault == "slow":
                    time.sleep(1.0)
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                body_bytes = outer.completion(body, fault)
                if fault != "open":  # a body without a length, cut short
                    self.send_header("Content-Length", str(len(body_bytes)))
                self.end_headers()
                self.wfile.write(body_bytes[:40] if fault in ("cut", "open") else body_bytes)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def completion(self, body: dict[str, Any], fault: str) -> bytes:
        if fault == "garbage":
            return b'{"error": "overloaded"}'
        said = "echo: " + body["messages"][-1]["content"]
        message: dict[str, Any] = {"role": "assistant", "content": said}
        if self.tool_call is not None:
            message["tool_calls"] = [{"id": "a", "type": "function", "function": self.tool_call}]
        top = [{"token": said, "logprob": -0.1, "bytes": None}, {"token": "no", "logprob": -2.5, "bytes": None}]
        logprobs = {"content": [{**top[0], "top_logprobs": top}]} if body.get("logprobs") else None
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": logprobs}
        found = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10} if self.usage else None
        return json.dumps(found | {"system_fingerprint": self.fingerprint, "usage": usage}).encode()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    started: list[Server] = []

    def start(*arguments: Any, **options: Any) -> Server:
        started.append(Server(*arguments, **options))
        return started[-1]

    yield start
    for server in started:
        server.close()


def teacher(server: Server, **options: Any) -> HttpTeacher:
    asking = Asking("m", top_logprobs=options.pop("top_logprobs", 0))
    return HttpTeacher(server.url, asking, timeout=0.4, sleep=lambda _: None, **options)


def records(count: int) -> list[Record]:
    return [Record("messages", messages=({"role": "user", "content": f"question {i}"},)) for i in range(count)]


def test_text_logprobs_counts_and_how_it_was_asked(serve: Callable[..., Server]) -> None:
    server = serve()
    said = teacher(server, top_logprobs=2).say([{"role": "user", "content": "hi"}])
    assert (said.content, said.finish, said.fingerprint) == ("echo: hi", "stop", "fp_1")
    assert (said.prompt_tokens, said.completion_tokens) == (7, 3)
    assert said.logprobs == [{"token": "echo: hi", "logprob": -0.1, "top": [["echo: hi", -0.1], ["no", -2.5]]}]
    (request,) = server.requests
    assert (request["temperature"], request["seed"], request["top_logprobs"]) == (0.0, 0, 2)
    assert request["key"] == f"Bearer {SECRET}"


def test_tool_calls_come_and_go_out_as_text(serve: Callable[..., Server]) -> None:
    server = serve()
    server.tool_call = {"name": "add", "arguments": '{"a": 1}'}
    said = teacher(server).say([{"role": "user", "content": "hi"}], [TOOL])
    assert said.tool_calls == [{"function": {"name": "add", "arguments": {"a": 1}}}]
    later = [{"role": "user", "content": "hi"}, said.message(), {"role": "tool", "content": "2"}]
    teacher(server).say(later, [TOOL])
    sent = server.requests[-1]["messages"]
    assert json.loads(sent[1]["tool_calls"][0]["function"]["arguments"]) == {"a": 1}
    assert sent[1]["tool_calls"][0]["id"] == sent[2]["tool_call_id"]


@pytest.mark.parametrize("fault", ["429", "500", "503", "slow", "cut", "open", "garbage"])
def test_every_passing_fault_is_retried(serve: Callable[..., Server], fault: str) -> None:
    server = serve([fault, fault])
    assert teacher(server).say([{"role": "user", "content": "hi"}]).content == "echo: hi"
    assert len(server.requests) == 3


@pytest.mark.parametrize("fault", ["429", "503"])
def test_the_wait_that_the_server_asks_for_is_kept(serve: Callable[..., Server], fault: str) -> None:
    """The client's own first wait would be half a second at most."""
    server = serve([fault])
    server.retry_after = "1"
    assert teacher(server).say([{"role": "user", "content": "hi"}]).content == "echo: hi"
    first, second = (request["at"] for request in server.requests)
    assert second - first >= 1


@pytest.mark.parametrize(
    ("faults", "words"),
    [(["401"], "answered 401: busy"), (["open"] * 3, "3 times in a row"), (["500"] * 3, "answered 500")],
)
def test_lasting_faults_are_named_without_the_key(serve: Callable[..., Server], faults: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        teacher(serve(faults), retries=2).say([{"role": "user", "content": "hi"}])
    assert SECRET not in str(caught.value)


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match="cannot be reached"):
        HttpTeacher(url, Asking("m"), timeout=1, retries=0).say([{"role": "user", "content": "hi"}])


def test_a_harvest_is_in_order_bounded_and_readable(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(["429", "cut", "500"])
    server.delay = 0.02
    voice, out = teacher(server), tmp_path / "train.jsonl"
    asked = questions([*records(12), *records(3)], voice.asking, voice.endpoint)  # three occur twice
    found = harvest(voice, asked, out, concurrency=3)
    assert (found.asked, found.known, found.left, found.tokens) == (12, 0, 0, 120)
    assert server.most_in_flight <= 3 and found.fingerprints == {"fp_1"}
    read = load_records(out)
    assert [r.messages[-1]["content"] for r in read] == [f"echo: question {i}" for i in range(12)]
    assert not out.with_name("train.jsonl.journal").exists()


def test_a_budget_stops_and_the_next_run_goes_on(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    voice, out = teacher(server), tmp_path / "train.jsonl"
    asked = questions(records(10), voice.asking, voice.endpoint)
    first = harvest(voice, asked, out, budget=Budget(requests=4), concurrency=1)
    assert (first.asked, first.left) == (4, 6) and not out.exists()
    with out.with_name("train.jsonl.journal").open("ab") as journal:
        journal.write(b'{"messages": [{"role"')  # a crash in the middle of a line
    second = harvest(voice, asked, out, budget=Budget(tokens=25), concurrency=1)
    assert (second.known, second.asked, second.left) == (4, 3, 3)
    third = harvest(voice, asked, out)
    assert (third.known, third.asked, third.left) == (7, 3, 0)
    assert len(load_records(out)) == len(server.requests) == 10


def test_a_fault_keeps_what_was_answered(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(["", "", "401"])
    voice, out = teacher(server), tmp_path / "train.jsonl"
    asked = questions(records(5), voice.asking, voice.endpoint)
    with pytest.raises(UserError, match="401"):
        harvest(voice, asked, out, concurrency=1)
    assert len(Journal(out.with_name("train.jsonl.journal")).answers) == 2
    assert harvest(voice, asked, out).known == 2


def test_replaying_finds_drift(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    voice = teacher(server)
    asked = questions(records(6), voice.asking, voice.endpoint)
    same = harvest(voice, asked, tmp_path / "a.jsonl", replay=3)
    assert (same.replayed, same.drift) == (3, [])
    harvest(voice, asked, tmp_path / "b.jsonl", budget=Budget(requests=5), concurrency=1)
    server.fingerprint = "fp_2"
    changed = harvest(voice, asked, tmp_path / "b.jsonl", replay=6)
    assert changed.replayed == 6 and len(changed.drift) == 5 and changed.fingerprints == {"fp_1", "fp_2"}


def test_a_token_budget_needs_a_server_that_counts(serve: Callable[..., Server], tmp_path: Path) -> None:
    voice = teacher(serve(usage=False))
    with pytest.raises(UserError, match="counts no tokens"):
        harvest(
            voice,
            questions(records(3), voice.asking, voice.endpoint),
            tmp_path / "x",
            budget=Budget(tokens=5),
            concurrency=1,
        )


def test_another_way_of_asking_is_another_question() -> None:
    ways = ((0, "http://a/v1"), (1, "http://a/v1"), (0, "http://b/v1"))
    (one,), (other,), (elsewhere,) = (questions(records(1), Asking("m", seed=seed), url) for seed, url in ways)
    assert len({one.key, other.key, elsewhere.key}) == 3
    with pytest.raises(UserError, match="nothing to answer"):
        questions([Record("text", text="story", source="f:1")], Asking("m"), "http://a/v1")


def test_the_command(serve: Callable[..., Server], tmp_path: Path) -> None:
    data, out = tmp_path / "asked.jsonl", tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"p{i}", "completion": ""}) + "\n" for i in range(3)))
    url = serve().url
    arguments = ["teach", "--endpoint", url, "--model", "m", "--data", str(data), "--out", str(out), "--json"]
    stopped = CliRunner().invoke(main, [*arguments, "--max-requests", "2"])
    assert stopped.exit_code == 1 and json.loads(stopped.stdout)["left"] == 1, stopped.output
    done = CliRunner().invoke(main, [*arguments, "--deterministic"])
    assert done.exit_code == 0 and json.loads(done.stdout)["replayed"] == 3, done.output
    assert len(load_records(out)) == 3 and SECRET not in done.output + out.read_text()
    refused = CliRunner().invoke(main, ["teach", "--endpoint", url, "--out", str(out)])
    assert refused.exit_code == 2 and "needs --data" in refused.stderr


def test_a_real_server(stories_model: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with model_server(stories_model, tmp_path / "log", "--chat-template", template) as base:
        voice = HttpTeacher(base, Asking(str(stories_model), max_tokens=6, top_logprobs=3))
        asked = questions(records(2), voice.asking, voice.endpoint)
        found = harvest(voice, asked, tmp_path / "out.jsonl", concurrency=2, replay=2)
    assert found.asked == 2 and found.replayed == 2 and not found.drift
    for line in (tmp_path / "out.jsonl").read_text().splitlines():
        facts = json.loads(line)["teacher"]
        assert facts["completion_tokens"] == len(facts["logprobs"]) == 6
        assert all(len(token["top"]) == 3 for token in facts["logprobs"])
