"""What a person may choose about a conversion, checked before anything is read or written."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from mlxkd.errors import UserError

Profile = Literal["ane", "gpu"]
KVLayout = Literal["state", "explicit"]
Place = Literal["host", "model"]
Head = Literal["logits", "argmax"]
TARGETS = ("iOS18", "iOS26")
KEEP = "keep"
CONTEXT = 2048
CHUNK_BYTES = 1_000_000_000
ALIGNMENT = 32


@dataclass(frozen=True)
class Options:
    """Choices of a conversion; None takes the profile's default.

    Args:
        profile: "ane" (1x1 convolutions, positions and embedding from the host) or "gpu" (linear layers,
            blockwise scales, positions and embedding in the model).
        target: oldest system that loads the bundle.
        context: tokens a row can hold, a multiple of 32; None for 2048, or what the model was made for if less.
        prefill, verify: tokens per call of those functions; ``verify`` 0 leaves it out.
        batch: batch sizes, one set of functions each.
        kv: keys and values as Core ML state, or read in and handed out by the host.
        embedding: whether tokens are embedded by the host or in the model.
        positions: whether cos, sin and masks come from the host or from the position in the model.
        head: "logits", or "argmax" for the greedy token and its score only.
        head_width: most vocabulary rows per head convolution; 0 for one.
        chunk_bytes: most weight bytes of one package. chunks: exact number of packages instead.
        rewind: tokens a sliding window can go back.
        weights: "keep" the source's own numbers or codes, or the grid to quantise linear layers to.
        master: float model to quantise from, where ``weights`` names a grid; default the source itself.
    """

    profile: Profile = "ane"
    target: str = "iOS18"
    context: int | None = None
    prefill: int = 64
    verify: int = 0
    batch: tuple[int, ...] = (1,)
    kv: KVLayout = "state"
    embedding: Place | None = None
    positions: Place | None = None
    head: Head = "logits"
    head_width: int | None = None
    chunk_bytes: int = CHUNK_BYTES
    chunks: int | None = None
    rewind: int = 64
    weights: str = KEEP
    master: Path | None = None

    def __post_init__(self) -> None:
        _choice("profile", self.profile, get_args(Profile))
        _choice("target", self.target, TARGETS)
        _choice("kv", self.kv, get_args(KVLayout))
        _choice("head", self.head, get_args(Head))
        for name in ("embedding", "positions"):
            _choice(name, getattr(self, name), (None, *get_args(Place)))
        if self.tokens < ALIGNMENT or self.tokens % ALIGNMENT:
            raise UserError(
                f"context {self.tokens} is not a positive multiple of {ALIGNMENT}, which states on the Neural "
                "Engine must be",
                where="--context",
                hint=f"use {max(ALIGNMENT, -(-self.tokens // ALIGNMENT) * ALIGNMENT)}",
            )
        if not 1 <= self.prefill <= self.tokens:
            raise UserError(f"prefill {self.prefill} must lie in 1..{self.tokens} (the context)", where="--prefill")
        if self.verify and not 2 <= self.verify <= self.tokens:
            raise UserError(f"verify {self.verify} must be 0 or lie in 2..{self.tokens}", where="--verify")
        if not self.batch or min(self.batch) < 1 or len(set(self.batch)) != len(self.batch):
            raise UserError(f"batch sizes {self.batch} must be distinct and positive", where="--batch")
        for name, least in (("chunk_bytes", 1), ("chunks", 1), ("head_width", 0), ("rewind", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{value} is less than {least}", where=option)
        if self.master is not None and self.weights == KEEP:
            raise UserError("a master is read only where --weights names a grid", where="--master")

    @property
    def tokens(self) -> int:
        """The context in force."""
        return CONTEXT if self.context is None else self.context

    def resolved(self, longest: int | None = None) -> Options:
        """The same options with every None replaced by its default.

        Args:
            longest: tokens the model was made for, where its config says.

        Raises:
            UserError: a context above ``longest``, or sizes above the context that follows from it.
        """
        fitting = CONTEXT if longest is None else min(CONTEXT, max(longest // ALIGNMENT, 1) * ALIGNMENT)
        context = fitting if self.context is None else self.context
        if longest is not None and context > longest:
            raise UserError(
                f"context {context} is above the {longest} positions that the model was made for",
                where="--context",
                hint=f"use {fitting} or less, or a model whose config.json scales its rotary embedding (rope_scaling)",
            )
        place: Place = "host" if self.profile == "ane" else "model"
        width = self.head_width if self.head_width is not None else (16384 if self.profile == "ane" else 0)
        return replace(
            self,
            context=context,
            embedding=self.embedding or place,
            positions=self.positions or place,
            head_width=width,
            batch=tuple(sorted(self.batch)),
        )

    def functions(self) -> list[tuple[str, str, int, int]]:
        """(name, role, batch, tokens per call) of every function, in the order they are written."""
        roles = [("prefill", self.prefill), ("decode", 1), *([("verify", self.verify)] if self.verify else [])]
        roles = [(role, query) for role, query in roles if role == "decode" or query > 1]
        return [
            (role if batch == 1 else f"{role}_b{batch}", role, batch, query)
            for batch in self.batch
            for role, query in roles
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the manifest."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _choice(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        listed = ", ".join(str(k) for k in known if k is not None)
        raise UserError(f"{value!r} is not one of {listed}", where=f"--{name}")
