"""Rendering: the loss falls on what the model must write, and on nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizer import CHATML, FORGETFUL, LLAMA2, OPEN_ENDED, tokenizer_folder

from mlxkd import compat
from mlxkd.data.example import Example, windows
from mlxkd.data.offsets import tokenise
from mlxkd.data.records import Record
from mlxkd.data.render import RenderOptions, render
from mlxkd.errors import UserError

CALLS = [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]
CHAT = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "weather in Paris"},
    {"role": "assistant", "content": "", "tool_calls": CALLS, "reasoning": ""},
    {"role": "tool", "content": '{"sky": "blue"}'},
    {"role": "assistant", "content": "It is blue, naïve 🙂.", "reasoning": "so"},
)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def build(template: str | None, **options: Any) -> Any:
        return compat.load_tokenizer(tokenizer_folder(tmp_path_factory.mktemp("tok"), template, **options))

    return build


def supervised(example: Example, tokenizer: Any) -> list[str]:
    """The runs of supervised tokens, decoded."""
    runs: list[list[int]] = []
    for i, weight in enumerate(example.weights):
        if weight > 0:
            if i == 0 or example.weights[i - 1] == 0:
                runs.append([])
            runs[-1].append(int(example.tokens[i]))
    return [tokenizer.decode(run) for run in runs]


def test_every_assistant_turn_and_its_end_token_carry_loss(load: Any) -> None:
    tokenizer = load(CHATML)
    example = render(
        Record("messages", messages=CHAT, tools=({"type": "function", "function": {"name": "f"}},)), tokenizer
    )
    assert supervised(example, tokenizer) == [
        '<tool_call>{"name":"get_weather","arguments":{"city": "Paris"}}</tool_call><|im_end|>',
        "It is blue, naïve 🙂.<|im_end|>",
    ]
    assert tokenizer.decode(example.tokens).startswith("<|im_start|>system\n")
    assert [s.kind for s in example.spans if s.kind == "turn"] == ["turn", "turn"]


def test_only_the_last_turn_when_asked(load: Any) -> None:
    tokenizer = load(CHATML)
    example = render(Record("messages", messages=CHAT), tokenizer, RenderOptions(turns="last"))
    assert supervised(example, tokenizer) == ["It is blue, naïve 🙂.<|im_end|>"]


def test_a_template_that_forgets_thoughts_is_still_located(load: Any) -> None:
    """Prefix rendering fails here: the first turn renders with a thought when it is last, without otherwise."""
    tokenizer = load(FORGETFUL)
    chat = (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one", "reasoning": "hm"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "two", "reasoning": "ah"},
    )
    example = render(Record("messages", messages=chat), tokenizer)
    assert supervised(example, tokenizer) == ["one<|im_end|>", "ah\n</think>\n\ntwo<|im_end|>"]


def test_llama2_style_and_templates_without_an_end_token(load: Any) -> None:
    chat = CHAT[1:2] + CHAT[4:] + CHAT[1:2] + CHAT[4:]
    tokenizer = load(LLAMA2, eos="</s>")
    assert supervised(render(Record("messages", messages=chat), tokenizer), tokenizer) == [
        " It is blue, naïve 🙂. </s>",
        " It is blue, naïve 🙂. </s>",
    ]
    tokenizer = load(OPEN_ENDED, eos="</s>")
    assert supervised(render(Record("messages", messages=chat), tokenizer), tokenizer) == [
        "It is blue, naïve 🙂.",
        "It is blue, naïve 🙂.</s>",
    ]


def test_a_conversation_may_start_with_the_assistant(load: Any) -> None:
    tokenizer = load(CHATML)
    example = render(Record("messages", messages=(CHAT[4], CHAT[1], CHAT[4])), tokenizer)
    assert supervised(example, tokenizer) == ["It is blue, naïve 🙂.<|im_end|>"] * 2


def test_completions_and_documents(load: Any, stories_model: Path) -> None:
    tokenizer = compat.load_tokenizer(stories_model)
    story = render(Record("text", text="Once upon a time"), tokenizer)
    assert story.tokens[0] == 1 and story.tokens[-1] == 2
    assert story.weights.tolist() == [0.0] + [1.0] * (len(story) - 1)
    example = render(Record("completion", prompt="Once upon", completion=" a time"), tokenizer)
    assert np.array_equal(example.tokens, story.tokens)
    assert supervised(example, tokenizer) == ["a time</s>"]
    chat = load(CHATML)
    example = render(Record("completion", prompt="q", completion="a"), chat)
    assert chat.decode(example.tokens) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"


def test_faults_name_the_line(load: Any) -> None:
    with pytest.raises(UserError, match=r"d.jsonl:3: the tokenizer has no chat template"):
        render(Record("messages", messages=CHAT, source="d.jsonl:3"), load(None))
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"d.jsonl:4: the chat template refuses.*roles must alternate"):
        render(Record("messages", messages=CHAT, source="d.jsonl:4"), load(refusing))
    shuffled = "{% for m in messages | reverse %}{{ m.content | upper }}{% endfor %}"
    record = Record("messages", messages=(CHAT[3], *CHAT[:2], *CHAT[3:]), source="d.jsonl:5")
    with pytest.raises(UserError, match=r"d.jsonl:5: messages\[4\] cannot be located"):
        render(record, load(shuffled))


class SlowTokenizer:
    """A tokenizer without offsets: SentencePiece itself."""

    def __init__(self, folder: Path):
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self.processor.encode(text, add_bos=add_special_tokens)

    @property
    def all_special_ids(self) -> list[int]:
        return [self.processor.bos_id()]

    def decode(self, ids: list[int]) -> str:
        # Hugging Face decodes special tokens to their names, SentencePiece to nothing.
        bos = self.processor.bos_id()
        name = "<s>" if bos in ids else ""
        return name + self.processor.decode([i for i in ids if i != bos])


def test_offsets_by_decoding_agree_with_the_fast_tokenizer(stories_model: Path) -> None:
    fast, slow = compat.load_tokenizer(stories_model), SlowTokenizer(stories_model)

    @settings(max_examples=60, deadline=None)
    @given(text=st.text(st.characters(codec="utf-8", exclude_characters="\r\u2581\ufffd"), min_size=1, max_size=30))
    def check(text: str) -> None:
        text = " ".join(text.split()) or "x"  # SentencePiece normalises runs of spaces away
        a, b = tokenise(text, slow, special=False), tokenise(text, fast, special=False)
        if np.array_equal(a.ids, b.ids):
            # At 0 they differ by right: whether the dummy prefix token covers the first character.
            for start in range(1, len(text)):
                assert a.cover(start, len(text)) == b.cover(start, len(text))

    check()
    marked = tokenise("Once upon", slow, special=True)
    assert marked.ids[0] == 1 and marked.cover(0, 4) == (1, 2) and marked.cover(5, 9) == (2, 3)


def test_windows_predict_every_token_once() -> None:
    tokens = np.arange(23, dtype=np.int32)
    weights = np.ones(23, np.float32)
    weights[0] = 0
    pieces = windows(Example(tokens, weights), 5)
    predicted = np.concatenate([piece.tokens[piece.weights > 0] for piece in pieces])
    assert predicted.tolist() == list(range(1, 23))
    assert max(len(piece) for piece in pieces) == 6
