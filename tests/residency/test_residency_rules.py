"""Every rule with a program that triggers it and one that does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ane.mil.program import Block, Feature, FunctionSpec, Literal, ModelSpec, Node
from ane.mil.types import StateType, TensorType, ValueType
from ane.residency.chips import chip
from ane.residency.predict import FunctionResidency, function_residency
from ane.residency.program import view
from ane.residency.table import table


def t(dtype: str, *shape: int | None) -> TensorType:
    return TensorType(dtype, shape)


def lit(value: Any, dtype: str = "fp16") -> Literal:
    array = np.asarray(value)
    return Literal(TensorType(dtype, array.shape), repr(value), array)


def weight(dtype: str, *shape: int) -> Literal:
    """A weight of which only the type matters."""
    return Literal(TensorType(dtype, shape), (dtype, shape), np.zeros(0))


def op(kind: str, out: ValueType, name: str = "", **inputs: Any) -> Node:
    bound = {k: v if isinstance(v, tuple) else (v,) for k, v in inputs.items()}
    return Node(kind, name or kind, bound, ((name or kind, out),) if out is not None else ())


def run(
    *nodes: Node,
    on: str = "m4",
    inputs: Mapping[str, ValueType] | None = None,
    outputs: tuple[str, ...] = (),
    features: Mapping[str, Feature] | None = None,
    states: Mapping[str, Feature] | None = None,
    functions: int = 1,
) -> FunctionResidency:
    given = {"x": t("fp16", 1, 64, 1, 64)} | dict(inputs or {})
    block = Block((), outputs or (nodes[-1].outputs[0][0],) if nodes[-1].outputs else (), nodes)
    main = FunctionSpec("main", "ios18", tuple(given.items()), block, dict(features or {}), {}, dict(states or {}))
    spec = ModelSpec("p.mlpackage", 9, {f"f{i}" if i else "main": main for i in range(functions)}, "main", {}, ())
    return function_residency(view(spec)[0], chip(on))


X = t("fp16", 1, 64, 1, 64)
S = t("fp16", 2, 2, 128, 64)
KV = {"kv": StateType(S)}
SHAPED = Feature("x", "array", "fp16", (1, 64, 1, 64))


def conv(w: Any = None, out: TensorType = X, **extra: Any) -> Node:
    return op("conv", out, x="x", weight=weight("fp16", 64, 64, 1, 1) if w is None else w, **extra)


def block_weight(blocks: int) -> tuple[Node, Node]:
    scaled = op(
        "constexpr_blockwise_shift_scale", t("fp16", 64, 64, 1, 1), "w",
        data=weight("int8", 64, 64, 1, 1), scale=weight("fp16", 64, blocks, 1, 1),
    )  # fmt: skip
    return scaled, conv("w")


def palette(groups_out: int, groups_in: int, length: int = 1, entries: int = 16) -> tuple[Node, Node]:
    made = op(
        "constexpr_lut_to_dense", t("fp16", 64, 64, 1, 1), "w", indices=weight("uint4", 64, 64, 1, 1),
        lut=weight("fp16", groups_out, groups_in, 1, 1, entries, length),
    )  # fmt: skip
    return made, conv("w")


def update(rows: int, reader: str) -> tuple[Node, ...]:
    cut = op("slice_update", S, "u", x="kv0", update="new", begin="pos", end="pos")
    last = op("write_state", None, "ws", input="kv", data="u") if reader == "state" else op("relu", S, "r", x="u")  # type: ignore[arg-type]
    return (op("read_state", S, "kv0", input="kv"), cut, last, op("relu", X, "done", x="x"))


def updating(rows: int, reader: str = "state") -> FunctionResidency:
    given: dict[str, ValueType] = KV | {"new": t("fp16", 1, 2, rows, 64), "pos": t("int32", 4)}
    return run(*update(rows, reader), inputs=given)


def state(*shape: int) -> FunctionResidency:
    given: dict[str, ValueType] = {"kv": StateType(t("fp16", *shape))}
    return run(op("read_state", t("fp16", *shape), input="kv"), inputs=given)


def states(count: int, length: int = 128) -> dict[str, Feature]:
    return {f"s{i}": Feature(f"s{i}", "state", "fp16", (2, 2, length, 64)) for i in range(count)}


def relu(*shape: int | None, dtype: str = "fp16", on: str = "m4") -> FunctionResidency:
    kind = t(dtype, *shape)
    return run(op("relu", kind, x="x"), inputs={"x": kind}, on=on)


def argmax(length: int, on: str) -> FunctionResidency:
    given = {"x": t("fp16", 1, length)}
    return run(op("reduce_argmax", t("uint16", 1), x="x", axis=lit(-1, "int32")), inputs=given, on=on)


def product(terms: int) -> FunctionResidency:
    given = {"a": t("fp16", 1, terms), "b": t("fp16", terms, 8)}
    return run(op("matmul", t("fp16", 1, 8), x="a", y="b"), inputs=given)


def slicing(start: int, on: str) -> FunctionResidency:
    return run(op("slice_by_index", X, x="x", begin=lit([0, 0, 0, start], "int32"), end=lit([1, 64, 1, 64], "int32"),
                  begin_mask=lit([False] * 4, "bool")), on=on)  # fmt: skip


def gather(indices: Any, dtype: str = "int32") -> FunctionResidency:
    given: dict[str, ValueType] = {"i": t(dtype, 1, 4)}
    return run(op("gather", t("fp16", 1, 4, 64), x=weight("fp16", 512, 64), indices=indices), inputs=given)


def stateful_palette(on: str) -> FunctionResidency:
    return run(*palette(1, 1), states=states(1), on=on)


HUGE = weight("fp16", 64, 64, 1, 1)
# rule -> (program that triggers it, program that does not)
CASES: dict[str, tuple[Any, Any]] = {
    "R1": (lambda: relu(1, 1, 1, 1, 2, 2), lambda: relu(1, 1, 1, 2, 2)),
    "R2": (lambda: relu(1, 64, 1, 64, dtype="fp32"), lambda: relu(1, 64, 1, 64)),
    "R3": (lambda: run(op("add", t("int32", 4), x="i", y="i"), inputs={"i": t("int32", 4)}), lambda: relu(1, 4, 1, 64)),
    "R4": (lambda: gather("i"), lambda: gather("i", "uint16")),
    "R5": (lambda: relu(1, None, 1, 64), lambda: relu(1, 64, 1, 64)),
    "R6": (lambda: relu(1, 8, 1, 20000, on="m3"), lambda: relu(1, 8, 1, 20000, on="m4")),
    "R7": (lambda: product(40000), lambda: product(4000)),
    "R8": (lambda: run(conv(weight("fp16", 64, 64, 1, 17))), lambda: run(conv(weight("fp16", 64, 64, 1, 7)))),
    "R9": (lambda: run(op("cumsum", X, x="x")), lambda: run(op("relu", X, x="x"))),
    "R10": (lambda: run(conv()), lambda: run(op("cumsum", X, x="x"))),
    "R11": (lambda: run(op("topk", X, x="x")), lambda: run(op("reduce_max", X, x="x"))),
    "R12": (lambda: run(op("scaled_dot_product_attention", X, query="x")), lambda: run(op("matmul", X, x="x", y="x"))),
    "R13": (lambda: updating(1, "relu"), lambda: updating(1)),
    "R14": (lambda: run(conv(), states=states(3)), lambda: run(conv(), states=states(2))),
    "R15": (lambda: state(2, 2, 128, 48), lambda: state(2, 2, 128, 64)),
    "R16": (lambda: updating(64), lambda: updating(32)),
    "R17": (lambda: run(*block_weight(2)), lambda: run(*block_weight(1))),
    "R18": (lambda: run(*palette(8, 1)), lambda: run(*palette(1, 2))),
    "R19": (lambda: run(*palette(1, 1, 32)), lambda: run(*palette(1, 1, 4))),
    "R20": (lambda: run(*block_weight(1), on="m1"), lambda: run(*block_weight(1), on="m2")),
    "R21": (None, lambda: run(conv())),
    "R22": (
        lambda: run(conv(), features={"x": Feature("x", "array", "fp16", (1, 64, 1, 1))}),
        lambda: run(conv(), features={"x": SHAPED}),
    ),
    "R23": (lambda: run(op("linear", X, x="x", weight=HUGE)), lambda: run(conv())),
    "R24": (
        lambda: run(conv(weight("fp16", 32000, 64, 1, 1)), on="m3"),
        lambda: run(conv(weight("fp16", 32000, 64, 1, 1)), on="m4"),
    ),
    "R25": (lambda: argmax(4096, "m1"), lambda: argmax(4096, "m2")),
    "R26": (lambda: run(conv()), lambda: relu(1, 8192, 64, 64)),
    "R27": (lambda: run(op("add", X, x="x", y=lit(-np.inf))), lambda: run(op("add", X, x="x", y=lit(-1e4)))),
    "R28": (lambda: run(conv(weight("fp16", 64, 6000, 1, 1))), lambda: run(conv())),
    "R29": (lambda: slicing(8, "m2"), lambda: slicing(8, "m3")),
    "R31": (lambda: mebibyte("m3"), lambda: mebibyte("m2")),
    "R32": (lambda: run(conv(), states=states(1, 4096)), lambda: run(conv(), states=states(1, 2048))),
    "R33": (lambda: run(conv(), functions=2), lambda: run(conv())),
    "R34": (lambda: stateful_palette("m5"), lambda: stateful_palette("m4")),
    "R35": (
        lambda: run(*palette(1, 1)[:1], op("constexpr_blockwise_shift_scale", t("fp16", 64, 64, 1, 1), "w2", data="w",
                    scale=weight("fp16", 64, 1, 1, 1)), conv("w2")),
        lambda: run(*block_weight(1)),
    ),
    "R36": (
        lambda: run(conv(), features={"x": Feature("x", "array", "fp16", (1, 1), shapes=((1, 1), (1, 64)))}),
        lambda: run(conv(), features={"x": SHAPED}),
    ),
    "R37": (lambda: run(op("made_up", X, x="x")), lambda: run(conv())),
    "R38": (lambda: run(*palette(1, 2)), lambda: run(*palette(2, 1))),
}  # fmt: skip


def mebibyte(on: str) -> FunctionResidency:
    stated = Literal(t("fp16", 512, 1024, 1, 1), "1MiB", np.zeros((512, 1024, 1, 1), np.float16))
    return run(conv(stated), on=on)


def spoken(result: FunctionResidency) -> set[str]:
    placed = [r for p in result.placements for r in (p.rule, *(n.rule for n in p.notes))]
    return {*placed, *(f.rule for f in result.findings)}


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == {r.id for r in table()}


@pytest.mark.parametrize("name", [n for n, (hit, _) in CASES.items() if hit])
def test_a_program_that_triggers_the_rule(name: str) -> None:
    result = CASES[name][0]()
    assert name in spoken(result)
    rule = next(r for r in table() if r.id == name)
    assert rule.source and (rule.fix or rule.verdict == "NE") and rule.check.__doc__
    off = rule.verdict in ("CPU", "FAIL", "BAD")
    assert (result.share < 1) == off, [p for p in result.placements if p.device != "ANE"]


@pytest.mark.parametrize("name", CASES)
def test_a_program_that_does_not(name: str) -> None:
    assert name not in spoken(CASES[name][1]())


def test_a_chunk_beyond_a_gigabyte_fails_as_a_whole() -> None:
    """Real weights of that size would not fit a test: the reader's sum is replaced by its result."""
    main = FunctionSpec("main", "ios18", (("x", X),), Block((), ("conv",), (conv(),)), {}, {}, {})
    function = view(ModelSpec("p", 9, {"main": main}, "main", {}, ()))[0]
    result = function_residency(replace(function, weight_bytes=1_100_000_000), chip("m4"))
    assert "R21" in spoken(result) and result.share == 0
    assert result.placements[0].reason == "1.10 GB of weights in one package; about 1 GB is safe"
