"""Generation end to end: the published text, batches, events, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from decode_models import tiny
from table_session import pruned

from ane.convert.export import export
from ane.convert.options import Options
from mlxkd.compat import save_model_folder
from mlxkd.decode.command import make_command
from mlxkd.decode.detokenize import full_decode
from mlxkd.decode.engine import Engine
from mlxkd.decode.generate import collect, complete, generate
from mlxkd.decode.mlx_session import MlxSession
from mlxkd.decode.requests import GenerateOptions, Request
from mlxkd.decode.sampling import SamplingOptions
from mlxkd.decode.session import ContextOverflow
from mlxkd.decode.tokens import Prompts
from mlxkd.errors import UserError


def test_greedy_from_bos_is_the_published_text(stories: Any, stories_model: Path) -> None:
    model, tokenizer, config = stories
    answer = complete(Engine(MlxSession(model, config), tokenizer), [1], GenerateOptions(max_tokens=200))
    expected = (stories_model / "expected_greedy.txt").read_text()
    assert expected.rstrip("\n") == answer.text and answer.finish == "length"


def test_events_join_to_the_full_decode(stories: Any) -> None:
    model, tokenizer, config = stories
    options = GenerateOptions(max_tokens=60, sampling=SamplingOptions(temperature=1.5, seed=4))
    events = list(generate(MlxSession(model, config), tokenizer, [1], options))
    tokens = [event.token for event in events]
    assert "".join(event.text for event in events) == full_decode(tokenizer, tokens)
    assert [event.forward for event in events] == list(range(1, 61))
    assert all(event.logprob < 0 and not event.drafted for event in events)
    stamps = [event.time_ns for event in events]
    assert stamps == sorted(stamps) and events[-1].finish == "length" and events[-2].finish is None


def test_a_seed_fixes_the_answer_and_another_changes_it(stories: Any) -> None:
    model, tokenizer, config = stories

    def answer(seed: int) -> tuple[int, ...]:
        options = GenerateOptions(max_tokens=30, sampling=SamplingOptions(temperature=1.0, top_p=0.95, seed=seed))
        return complete(Engine(MlxSession(model, config), tokenizer), [1], options).tokens

    assert answer(1) == answer(1) != answer(2)


def test_answers_do_not_depend_on_batch_mates(stories: Any) -> None:
    model, tokenizer, config = stories
    prompts = Prompts(tokenizer).raw_batch(["Once", "Tom and Sue", "", "The big dog was sad", "Lily", "One day"])
    requests = []
    for i, prompt in enumerate(prompts):
        sampling = SamplingOptions(temperature=0.8 if i % 2 else 0.0, seed=i)
        requests.append(Request(prompt, GenerateOptions(max_tokens=12 + 5 * i, sampling=sampling), str(i)))
    together = collect(Engine(MlxSession(model, config, batch_size=3), tokenizer).run(requests))
    for request in requests:
        alone = complete(Engine(MlxSession(model, config), tokenizer), request.prompt, request.options)
        assert together[request.name].tokens == alone.tokens


def test_a_full_context_ends_the_answer_and_a_long_prompt_is_refused(stories: Any) -> None:
    model, tokenizer, config = stories
    session = MlxSession(model, config, max_context=20)
    options = GenerateOptions(max_tokens=100)
    answer = complete(Engine(session, tokenizer), [1] * 15, options)
    assert answer.finish == "context" and len(answer.tokens) == 6
    long = complete(Engine(MlxSession(model, config), tokenizer), [1] * 15, options)
    assert long.tokens[:6] == answer.tokens
    with pytest.raises(ContextOverflow, match="a prompt of 21 tokens does not fit into 20"):
        complete(Engine(session, tokenizer), [1] * 21, options)


def test_models_that_cannot_rewind_decode_too(stories: Any) -> None:
    """A recurrent model with another tokenizer's ids: only the loop matters here."""
    _, tokenizer, _ = stories
    model, config = tiny("lfm2")
    requests = [Request((3, 4 + i), GenerateOptions(max_tokens=9, stop_tokens=frozenset()), str(i)) for i in range(3)]
    together = collect(Engine(MlxSession(model, config, batch_size=2), tokenizer).run(requests))
    for request in requests:
        alone = complete(Engine(MlxSession(model, config), tokenizer), request.prompt, request.options)
        assert together[request.name].tokens == alone.tokens and len(alone.tokens) == 9


def test_the_command_reproduces_the_published_text(stories_model: Path) -> None:
    expected = (stories_model / "expected_greedy.txt").read_text()
    shared = [str(stories_model), "", "--raw", "--max-tokens", "200"]
    for extra in ([], ["--stream"]):
        result = CliRunner().invoke(make_command(), [*shared, *extra], catch_exceptions=False)
        assert result.exit_code == 0 and result.output == expected
    result = CliRunner().invoke(make_command(), [*shared, "--json"], catch_exceptions=False)
    assert json.loads(result.output)["text"] == expected.rstrip("\n")


def test_the_command_answers_a_batch(stories_model: Path, tmp_path: Path) -> None:
    batch = tmp_path / "prompts.jsonl"
    batch.write_text('{"prompt": "Once"}\n\n{"prompt": "Tom"}\n')
    arguments = [str(stories_model), "--batch", str(batch), "--rows", "2", "--raw", "--max-tokens", "8", "--json"]
    result = CliRunner().invoke(make_command(), arguments, catch_exceptions=False)
    answers = [json.loads(line) for line in result.output.splitlines()]
    assert [a["request"] for a in answers] == ["0", "1"] and all(len(a["tokens"]) == 8 for a in answers)


def test_mistakes_on_the_command_line(stories_model: Path, tmp_path: Path) -> None:
    def error(*arguments: str) -> str:
        result = CliRunner().invoke(make_command(), [str(stories_model), *arguments])
        assert isinstance(result.exception, UserError)
        return str(result.exception)

    assert "give either a PROMPT or --batch FILE" in error()
    assert "no chat template\nhint: pass --raw" in error("hello")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert f'{bad}:2: expected either "prompt" or "messages"' in error("--batch", str(bad))
    assert "temperature = -1.0 is out of range" in error("x", "--raw", "--temperature", "-1")


def test_the_command_speculates_caches_and_explains(
    stories: Any, stories_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One drafter pruned from the model, a cache file used twice and then refused, a batch with a measured size."""
    model, _, config = stories
    small, small_config = pruned(model, config, (0, 1, 3))
    save_model_folder(tmp_path / "drafter", small, small_config, stories_model)
    prompt = "Once upon a time, there was a little girl named Lily."
    shared = [str(stories_model), prompt, "--raw", "--max-tokens", "30", "--json"]

    def answer(*extra: str) -> Any:
        result = CliRunner().invoke(make_command(), [*shared, *extra], catch_exceptions=False)
        return json.loads(result.stdout), result.stderr

    plain, _ = answer()
    drafted, _ = answer("--draft", str(tmp_path / "drafter"), "--draft-tokens", "3")
    assert drafted["tokens"] == plain["tokens"] and drafted["statistics"]["accepted"] > 0
    cache = str(tmp_path / "cache")
    cold, _ = answer("--prompt-cache", cache, "--draft", "ngram")
    warm, _ = answer("--prompt-cache", cache)
    assert cold["tokens"] == warm["tokens"] == plain["tokens"]
    assert cold["statistics"]["cached_tokens"] == 0
    assert warm["statistics"]["cached_tokens"] == warm["prompt_tokens"] - 1
    (tmp_path / "cache.safetensors").write_bytes(b"nonsense")
    again, said = answer("--prompt-cache", cache)
    assert again["tokens"] == plain["tokens"] and "prompt cache not used" in said and "damaged" in said
    monkeypatch.setenv("MLXKD_BATCH_POLICY", str(tmp_path / "policy.json"))
    batch = tmp_path / "prompts.jsonl"
    batch.write_text('{"prompt": "Once"}\n{"prompt": "Tom"}\n')
    arguments = [str(stories_model), "--batch", str(batch), "--raw", "--max-tokens", "5"]
    result = CliRunner().invoke(make_command(), arguments, catch_exceptions=False)
    assert "offline: batch" in result.stderr and len(json.loads((tmp_path / "policy.json").read_text())) == 1


def test_a_bundle_offers_the_rows_it_was_exported_with(
    stories_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the MIL runtime: offline measures those sizes and answers as one row at a time does."""
    export(stories_model, tmp_path / "bundle", Options(context=64, prefill=8, batch=(1, 2)))
    monkeypatch.setenv("MLXKD_BATCH_POLICY", str(tmp_path / "policy.json"))
    batch = tmp_path / "prompts.jsonl"
    batch.write_text('{"prompt": "Once"}\n{"prompt": "Tom"}\n{"prompt": "Lily"}\n')
    shared = [str(tmp_path / "bundle"), "--batch", str(batch), "--raw", "--max-tokens", "5", "--backend", "mil"]
    results = [
        CliRunner().invoke(make_command(), [*shared, "--workload", workload], catch_exceptions=False)
        for workload in ("offline", "interactive")
    ]
    assert results[0].stdout == results[1].stdout
    assert "offline: batch" in results[0].stderr and "interactive" in results[1].stderr
    (choice,) = json.loads((tmp_path / "policy.json").read_text()).values()
    assert [m["batch"] for m in choice["measurements"]] == [1, 2]
