"""Train the demo world's SentencePiece tokenizer and write it as a Hugging Face tokenizer folder.

Words keep the same pieces wherever they stand: a space is always a piece of its own, digits are single,
letters never merge with punctuation. What a call must copy from a request is then the same token sequence.
"""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxkd.demo.world import conversations
from mlxkd.files import atomic_file, write_json

VOCABULARY = 1536
TEMPLATE = Path(__file__).with_name("chat_template.jinja")
ROLE_MARKS = ("<|end|>", "<|tools|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
CALL_MARKS = ("<tool_call>", "</tool_call>")
# Cuts the training text where pieces must end; never part of a piece.
CUT = "\x1f"


def training_text(seed: int, count: int) -> Iterator[str]:
    """Lines of world text with a cut on both sides of every space."""
    rng = random.Random(seed)
    for record in conversations("train", seed, count):
        for part in _texts(record):
            for line in part.splitlines():
                yield line.replace(" ", f"{CUT} {CUT}")
    # Every printable ASCII character has a piece, so that ordinary text needs no byte pieces.
    printable = [chr(c) for c in range(33, 127)]
    for _ in range(20):
        rng.shuffle(printable)
        yield CUT.join(printable)


def _texts(record: dict[str, Any]) -> Iterator[str]:
    for tool in record["tools"]:
        function = tool["function"]
        yield f"{function['name']} {function['description']}"
        for name, schema in function["parameters"]["properties"].items():
            yield f"{name} {'|'.join(schema.get('enum', [])) or schema['type']}"
    for message in record["messages"]:
        yield message["content"]
        for call in message.get("tool_calls", ()):
            yield json.dumps(call["function"], ensure_ascii=False, separators=(",", ":"))


def train_tokenizer(folder: Path, *, seed: int = 0, count: int = 20_000) -> None:
    """Train the tokenizer and write ``tokenizer.model``, ``tokenizer.json`` and their configuration."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()  # a written file would carry its path inside
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_text(seed, count)),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pretokenization_delimiter=CUT,
        user_defined_symbols=[*ROLE_MARKS, *CALL_MARKS, "\n"],
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    with atomic_file(folder / "tokenizer.model") as temporary:
        temporary.write_bytes(model.getvalue())
    write_fast_tokenizer(folder)


def write_fast_tokenizer(folder: Path) -> None:
    """Derive ``tokenizer.json`` and ``tokenizer_config.json`` from ``tokenizer.model``."""
    import sentencepiece
    import tokenizers
    from tokenizers import decoders, models, normalizers

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    model = models.BPE(vocab=vocabulary, merges=_merges(pieces, vocabulary), byte_fallback=True, unk_token="<unk>")
    fast = tokenizers.Tokenizer(model)
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens(["<unk>", *ROLE_MARKS])
    fast.add_tokens([tokenizers.AddedToken(mark, normalized=False) for mark in CALL_MARKS])
    fast.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|end|>",
            "pad_token": "<unk>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1024,
        },
    )
    shutil.copyfile(TEMPLATE, folder / "chat_template.jinja")


def _merges(pieces: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs that make a piece, best first: SentencePiece gives a merge's rank as its negative score."""
    ranked: list[tuple[float, int, tuple[str, str]]] = []
    for piece, index in vocabulary.items():
        if pieces.is_byte(index) or pieces.is_control(index) or piece in (*ROLE_MARKS, *CALL_MARKS):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-pieces.get_score(index), cut, (left, right)))
    return [pair for _, _, pair in sorted(ranked)]
