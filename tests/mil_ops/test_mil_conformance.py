"""The conformance harness: that it judges rightly, and that the sample of coremltools' tests passes."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ane.mil.conformance import case, check, plugin, suite, table
from mlxkd.runtime import import_coremltools


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A matrix product saved by coremltools in both precisions."""
    ct = import_coremltools()
    mb = ct.converters.mil.Builder
    weight = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    folder = tmp_path_factory.mktemp("models")
    paths = {}
    for dtype, precision in (("fp32", ct.precision.FLOAT32), ("fp16", ct.precision.FLOAT16)):

        @mb.program(input_specs=[mb.TensorSpec((3, 8))], opset_version=ct.target.iOS17)
        def program(x):
            return mb.matmul(x=x, y=weight, name="y")

        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS17,
            compute_precision=precision,
            skip_model_load=True,
        )
        paths[dtype] = folder / f"{dtype}.mlpackage"
        model.save(str(paths[dtype]))
    return paths


def _case(model: Path, dtype: str, offset: float = 0.0) -> case.Case:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 16)).astype(np.float32)
    x = rng.standard_normal((3, 8)).astype(np.float32)
    facts = case.Facts("a/test.py::test[x]", 0, dtype, 1e-4, 1e-5)
    found = case.Case(model.parent, facts, (({"x": x}, {"y": x @ weight + np.float32(offset)}),))
    return found


def _judge(monkeypatch: pytest.MonkeyPatch, model: Path, dtype: str, offset: float) -> check.Verdict:
    monkeypatch.setattr(case, "MODEL", model.name)
    return check.evaluate(_case(model, dtype, offset))


@pytest.mark.parametrize(
    "dtype,offset,status",
    [("fp32", 0.0, "passed"), ("fp32", 5e-4, "failed"), ("fp16", 0.0, "passed"), ("fp16", 0.4, "failed")],
)
def test_a_wrong_output_is_seen_far_below_apples_half(
    monkeypatch, models, dtype: str, offset: float, status: str
) -> None:
    """0.4 passes Apple's fp16 bound (0.5); a product of 8 terms in fp16 cannot be off by that."""
    verdict = _judge(monkeypatch, models[dtype], dtype, offset)
    assert verdict.status == status, verdict
    assert verdict.operations == ("matmul",) and verdict.opset == "ios17" and verdict.shape == "rank 2"
    if status == "failed":
        assert verdict.detail.startswith("y is off by")


def test_refusing_is_right_only_where_the_test_demands_it(monkeypatch, models) -> None:
    monkeypatch.setattr(case, "MODEL", models["fp32"].name)
    whole = _case(models["fp32"], "fp32")
    short = ({"x": np.zeros((2, 8), np.float32)}, {"y": np.zeros((2, 16), np.float32)})
    for test, status in (("a.py::test_b[x]", "failed"), ("a.py::test_ios17_invalid_indices[x]", "passed")):
        facts = dataclasses.replace(whole.facts, test=test)
        verdict = check.evaluate(dataclasses.replace(whole, facts=facts, steps=(short,)))
        assert verdict.status == status and "refused: " in verdict.detail


def test_a_case_survives_the_disk(tmp_path: Path) -> None:
    facts = case.Facts("iOS17/test_conv.py::T::test[a/b]", 2, "fp32", 1e-4, 1e-5)
    steps = tuple(({"x": np.full((2,), i)}, {"y/z": np.float32(i)}) for i in range(12))
    folder = case.save(tmp_path, facts, steps, lambda path: path.mkdir())
    back = case.read(folder)
    assert back.facts == facts and list(case.stored(tmp_path)) == [folder]
    assert [(float(i["x"][0]), float(o["y/z"])) for i, o in back.steps] == [(i, i) for i in range(12)]


def _record(test: str, status: str, dtype: str = "fp32", operations: tuple[str, ...] = ("conv",), **more) -> dict:
    base = {
        "key": test,
        "test": test,
        "status": status,
        "dtype": dtype,
        "precision": dtype,
        "operations": list(operations),
    }
    facts = {"opset": "ios17", "shape": "rank 4", "atol": 1e-4, "rtol": 1e-5, "error": 1e-6, "seconds": 0.1}
    return base | facts | {"detail": "" if status == "passed" else "y is off by 3"} | more


def test_shares_leave_recurrent_layers_out_of_the_claim_only() -> None:
    records = [
        *(_record(f"a{i}", "passed") for i in range(3)),
        _record("b", "unsupported"),
        _record("c", "unsupported", operations=("lstm",)),
        _record("d", "failed", operations=("gru",)),
        _record("e", "failed", "mixed"),
        _record("g", "disputed"),
        {"key": "f", "test": "f", "status": "nothing"},
    ]
    assert table.shares(records) == {
        "fp32_claimed_share": (4 / 5, 5),
        "fp32_passed_share": (3 / 5, 5),
        "fp16_passed_share": (0.0, 1),
    }
    page = table.markdown(records, "9.0")
    assert "| fp32 | 7 | 3 | 2 | 1 | 1 |" in page
    assert "| `conv` | ios17 | 5 | 3 | 1 | 1 | 0 | 1 | 0 | 0 | 0 | 1 | 1.0e-06 |" in page
    assert "* `d`, fp32, 1 cases: y is off" in page


def test_the_sample_covers_each_operation_with_tests_that_pass() -> None:
    records = [
        _record("slow", "passed", seconds=9.0),
        _record("quick", "passed", operations=("conv", "add")),
        _record("older", "passed", opset="ios16", seconds=0.2),
        _record("half", "passed", "fp16", operations=("softmax",)),
        _record("bad", "failed", operations=("gather",)),
    ]
    chosen = table.choose(records)
    assert chosen["every_run"] == ["half", "quick"] and chosen["strata"] == ["half", "older", "quick"]


def test_a_time_limited_run_goes_round_robin() -> None:
    def item(name: str, backend: str, index: int):
        return SimpleNamespace(nodeid=f"{name}[{index}]", callspec=SimpleNamespace(params={"backend": backend}))

    items = [item(name, backend, i) for name in ("a", "b") for backend in ("fp16", "fp32") for i in range(5)]
    order = [plugin.group_of(i) for i in plugin.round_robin(items)]  # type: ignore[arg-type]
    assert len(set(order[:4])) == 4 and set(Counter(order[:8]).values()) == {2}


def _can_be_imported(test: str) -> bool:
    """Whether the test's file is usable here: two of them need torch merely to be read."""
    try:
        importlib.import_module(f"{plugin.SUITE}.{test.partition('.py::')[0].replace('/', '.')}")
    except (ImportError, NameError):
        return False
    return True


def _all_pass(tests: list[str], results: Path) -> None:
    """Every comparison agrees; only a test that torch is missing for may compare nothing."""
    has_torch = importlib.util.find_spec("torch") is not None
    chosen = [test for test in tests if has_torch or _can_be_imported(test)]
    code = suite.run(chosen, results=results)
    records = table.compared(suite.read_results(results))
    wrong = [f"{r['test']}: {r['detail']}" for r in records if r["status"] != "passed"]
    assert not wrong, "\n".join(wrong)
    silent = set(chosen) - {r["test"] for r in records}
    if has_torch:
        assert code == 0 and not silent, silent
    assert len(chosen) - len(silent) >= 0.9 * len(tests), silent


def test_each_operation_passes_coremltools_own_test(tmp_path: Path) -> None:
    """Live from the installed coremltools."""
    _all_pass(suite.sample(), tmp_path / "results.jsonl")


@pytest.mark.slow
def test_each_stratum_passes_coremltools_own_test(tmp_path: Path) -> None:
    _all_pass(suite.sample("strata"), tmp_path / "results.jsonl")


@pytest.mark.slow
def test_every_harvested_case_passes() -> None:
    root = case.cache_folder() / "cases"
    if not any(True for _ in case.stored(root)):
        pytest.skip("no case is stored (python -m ane.mil.conformance harvest)")
    wrong = [f"{r['test']}: {r['detail']}" for r in suite.replay(root) if r["status"] == "failed"]
    assert not wrong, "\n".join(wrong)
