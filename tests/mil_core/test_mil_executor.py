"""How programs run: control flow, lifetimes, sharing, precision, states, limits."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ane.mil.backend import NumPyProducts
from ane.mil.limits import Limits
from ane.mil.package import Package, load
from mlxkd.errors import UserError

Run = Callable[..., Package]


def test_branches_and_loops_follow_python(ct: Any, mb: Any, run: Run) -> None:
    @mb.program(input_specs=[mb.TensorSpec((3,)), mb.TensorSpec((1,))], opset_version=ct.target.iOS17)
    def program(x, y):  # type: ignore[no-untyped-def]
        doubled = mb.mul(x=x, y=2.0)

        def body(i, total):  # type: ignore[no-untyped-def]
            # Reads a value from around the loop, and branches inside it.
            odd = mb.greater(x=mb.mod(x=i, y=2.0), y=0.5)
            added = mb.cond(
                pred=odd, _true_fn=lambda: mb.add(x=total, y=doubled), _false_fn=lambda: mb.sub(x=total, y=x)
            )
            return mb.add(x=i, y=1.0), added

        turns = mb.squeeze(x=y)
        _, total = mb.while_loop(
            _cond=lambda i, total: mb.less(x=i, y=turns), _body=body, loop_vars=(mb.const(val=0.0), mb.mul(x=x, y=0.0))
        )
        return mb.identity(x=total, name="total")

    function = run(program, minimum_deployment_target=ct.target.iOS17).function()
    x = np.array([1, -2, 3], np.float32)
    for turns in (0, 1, 5):
        expected = np.zeros(3, np.float32)
        for i in range(turns):
            expected = expected + 2 * x if i % 2 else expected - x
        np.testing.assert_allclose(function.predict({"x": x, "y": [turns]})["total"], expected)


def test_lists_are_written_and_read(ct: Any, mb: Any, run: Run) -> None:
    @mb.program(input_specs=[mb.TensorSpec((3, 2))], opset_version=ct.target.iOS17)
    def program(x):  # type: ignore[no-untyped-def]
        items = mb.make_list(init_length=2, dynamic_length=True, elem_shape=(np.int32(2),), dtype="fp32")
        items = mb.list_scatter(ls=items, indices=np.array([2, 0, 1], np.int32), value=x)
        items = mb.list_write(ls=items, index=1, value=mb.list_read(ls=items, index=0))
        length = mb.cast(x=mb.list_length(ls=items), dtype="fp32")
        gathered = mb.list_gather(ls=items, indices=np.array([0, 1, 2], np.int32))
        return mb.mul(x=gathered, y=length, name="y")

    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    got = run(program, minimum_deployment_target=ct.target.iOS17).predict({"x": x})["y"]
    np.testing.assert_array_equal(got, 3 * x[[1, 1, 0]])


def chain(ct: Any, mb: Any, length: int) -> Any:
    @mb.program(input_specs=[mb.TensorSpec((4,))], opset_version=ct.target.iOS17)
    def program(x):  # type: ignore[no-untyped-def]
        for _ in range(length):
            x = mb.sin(x=x)
        return mb.identity(x=x, name="y")

    return program


def test_values_are_freed_after_their_last_use(ct: Any, mb: Any, run: Run) -> None:
    function = run(chain(ct, mb, 6), minimum_deployment_target=ct.target.iOS17).function()
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def observe(step: Any, results: tuple[Any, ...]) -> None:
        nonlocal most
        alive.extend(weakref.ref(r) for r in results)
        most = max(most, sum(ref() is not None for ref in alive))

    inputs = {"x": np.ones(4, np.float32)}
    function._executor.run(inputs, observe=observe)
    assert len(alive) >= 6
    assert most <= 2


def test_constants_are_decoded_once_for_all_functions(
    ct: Any, mb: Any, save: Callable[..., Any], tmp_path: Any
) -> None:
    weight = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)

    def program(rows: int) -> Any:
        @mb.program(input_specs=[mb.TensorSpec((rows, 16))], opset_version=ct.target.iOS18)
        def linear(x):  # type: ignore[no-untyped-def]
            return mb.linear(x=x, weight=weight, name="y")

        return linear

    description = ct.utils.MultiFunctionDescriptor()
    for rows in (1, 4):
        description.add_function(str(save(program(rows), name=f"rows{rows}")), "main", f"rows{rows}")
    description.default_function_name = "rows1"
    ct.utils.save_multifunction(description, str(tmp_path / "both.mlpackage"))
    package = load(tmp_path / "both.mlpackage")
    package.function("rows1").predict({"x": np.ones((1, 16))})
    pool = package.function("rows1")._pool
    decoded = pool.bytes
    assert decoded >= weight.nbytes
    package.function("rows4").predict({"x": np.ones((4, 16))})
    assert pool.bytes - decoded < weight.nbytes


def test_beyond_the_memory_bound_weights_are_decoded_at_every_use(ct: Any, mb: Any, save: Callable[..., Any]) -> None:
    weights = [np.random.default_rng(i).standard_normal((32, 32)).astype(np.float32) for i in range(4)]

    @mb.program(input_specs=[mb.TensorSpec((1, 32))], opset_version=ct.target.iOS18)
    def program(x):  # type: ignore[no-untyped-def]
        for weight in weights:
            x = mb.linear(x=x, weight=weight)
        return mb.identity(x=x, name="y")

    path = save(program)
    x = np.ones((1, 32), np.float32)
    tight = load(path, limits=Limits(memory=2 * weights[0].nbytes))
    for _ in range(2):
        np.testing.assert_array_equal(tight.predict({"x": x})["y"], load(path).predict({"x": x})["y"])
    assert tight.function()._pool.bytes <= 2 * weights[0].nbytes


def test_fp16_mode_rounds_after_every_operation_as_numpy_does(ct: Any, mb: Any, run: Run) -> None:
    @mb.program(input_specs=[mb.TensorSpec((64,), None)], opset_version=ct.target.iOS17)
    def program(x):  # type: ignore[no-untyped-def]
        y = mb.mul(x=mb.add(x=x, y=1.7), y=x)
        return mb.mul(x=mb.sub(x=y, y=0.3), y=x, name="y")

    options = {"minimum_deployment_target": ct.target.iOS17, "compute_precision": ct.precision.FLOAT16}
    function = run(program, **options).function()
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    h = x.astype(np.float16)
    expected = (((h + np.float16(1.7)) * h) - np.float16(0.3)) * h
    got = function.predict({"x": x}, mode="fp16")["y"]
    np.testing.assert_array_equal(got.astype(np.float16), expected)
    exact = h.astype(np.float64)
    exact = (((exact + np.float16(1.7).astype(np.float64)) * exact) - np.float16(0.3).astype(np.float64)) * exact
    got = function.predict({"x": x}, mode="exact")["y"]
    np.testing.assert_allclose(got.astype(np.float64), exact, rtol=6e-4, atol=1e-6)
    assert np.abs(exact - expected).max() > np.abs(exact - got).max()


def test_a_trace_shows_where_fp16_overflows(ct: Any, mb: Any, run: Run) -> None:
    @mb.program(input_specs=[mb.TensorSpec((2,))], opset_version=ct.target.iOS17)
    def program(x):  # type: ignore[no-untyped-def]
        big = mb.mul(x=x, y=300.0, name="big")
        small = mb.mul(x=mb.sqrt(x=big), y=0.01, name="small")
        return mb.identity(x=small, name="y")

    options = {"minimum_deployment_target": ct.target.iOS17, "compute_precision": ct.precision.FLOAT16}
    function = run(program, **options).function()
    trace = function.trace({"x": [300.0, 1.0]})
    (entry,) = [e for e in trace.suspects() if e.operation == "mul"]
    assert (entry.shape, entry.dtype, entry.overflow, entry.inf, entry.high) == ((2,), "fp16", 1, 0, 90000.0)
    np.testing.assert_array_equal(trace[entry.name], [90000, 300])
    # Carried on in fp32, the result is right; rounded as a device would, it is infinite.
    np.testing.assert_allclose(trace.outputs["y"], [3, 0.1732], rtol=1e-3)
    rough = function.trace({"x": [300.0, 1.0]}, mode="fp16")
    assert np.isinf(rough.outputs["y"][0])
    assert [e.inf for e in rough.entries if e.name == entry.name] == [1]


def cached(ct: Any, mb: Any, types: Any) -> Any:
    state = mb.StateTensorSpec((4, 2), types.fp16)
    specs = [mb.TensorSpec((1, 2), types.fp16), mb.TensorSpec((1,), types.int32), mb.TensorSpec((4, 1), types.fp16)]

    @mb.program(input_specs=[*specs, state], opset_version=ct.target.iOS18)
    def program(x, position, mask, cache):  # type: ignore[no-untyped-def]
        begin = mb.concat(values=[position, [np.int32(0)]], axis=0)
        end = mb.concat(values=[mb.add(x=position, y=np.int32(1)), [np.int32(2)]], axis=0)
        new = mb.slice_update(x=mb.read_state(input=cache), update=x, begin=begin, end=end)
        full = mb.coreml_update_state(state=cache, value=new)
        weights = mb.softmax(x=mask, axis=0)
        return mb.reduce_sum(x=mb.mul(x=full, y=weights), axes=[0], name="y")

    return program


def test_a_mask_that_lets_unwritten_slots_through_is_seen(ct: Any, mb: Any, types: Any, run: Run) -> None:
    function = run(cached(ct, mb, types), compute_precision=ct.precision.FLOAT16).function()
    inputs = {"x": [[1.0, 2.0]], "position": [1]}
    right = np.array([-1e4, 0, -1e4, -1e4]).reshape(4, 1)
    wrong = np.array([-1e4, 0, 0, -1e4]).reshape(4, 1)
    for fill in ("auto", "zero"):
        got = function.predict({**inputs, "mask": right}, function.make_state(fill))["y"]
        np.testing.assert_array_equal(got, [1, 2])
    assert function.predict({**inputs, "mask": wrong}, function.make_state("zero"))["y"].max() == 1
    assert function.predict({**inputs, "mask": wrong}, function.make_state())["y"].min() > 60


def test_states_are_kept_copied_and_checked(ct: Any, mb: Any, types: Any, run: Run) -> None:
    function = run(cached(ct, mb, types), compute_precision=ct.precision.FLOAT16).function()
    state = function.make_state("zero")
    mask = np.zeros((4, 1))
    function.predict({"x": [[1, 2]], "position": [0], "mask": mask}, state)
    before, branch = state.read_state("cache"), state.copy()
    address = branch.slots["cache"].array.ctypes.data
    function.predict({"x": [[3, 4]], "position": [1], "mask": mask}, branch)
    # The cache is updated in place, and what was handed out or copied before stays as it was.
    assert branch.slots["cache"].array.ctypes.data == address
    np.testing.assert_array_equal(before, [[1, 2], [0, 0], [0, 0], [0, 0]])
    np.testing.assert_array_equal(state.read_state("cache"), before)
    np.testing.assert_array_equal(branch.read_state("cache")[1], [3, 4])
    state.write_state("cache", np.full((4, 2), 7))
    assert state.read_state("cache").dtype == np.float16
    with pytest.raises(UserError, match=r"state 'cache' is fp16\[4, 2\], the value has shape \[2\]"):
        state.write_state("cache", np.zeros(2))
    with pytest.raises(UserError, match="unknown state 'kache'"):
        state.read_state("kache")
    with pytest.raises(UserError, match="function 'main' has states: cache"):
        function.predict({"x": [[1, 2]], "position": [0], "mask": mask})


def test_an_array_that_someone_else_reads_is_not_overwritten(ct: Any, mb: Any, types: Any, run: Run) -> None:
    """A view of the cache outlives the update of the cache: writing in place would change it under its reader."""
    specs = [mb.TensorSpec((1, 2), types.fp16), mb.StateTensorSpec((4, 2), types.fp16)]

    @mb.program(input_specs=specs, opset_version=ct.target.iOS18)
    def program(x, cache):  # type: ignore[no-untyped-def]
        before = mb.read_state(input=cache)
        first = mb.slice_by_size(x=before, begin=[0, 0], size=[1, 2])
        new = mb.slice_update(x=before, update=x, begin=[0, 0], end=[1, 2])
        full = mb.coreml_update_state(state=cache, value=new)
        now = mb.slice_by_size(x=full, begin=[0, 0], size=[1, 2])
        return mb.sub(x=now, y=first, name="y")

    function = run(program, compute_precision=ct.precision.FLOAT16).function()
    state = function.make_state("zero")
    np.testing.assert_array_equal(function.predict({"x": [[1, 2]]}, state)["y"], [[1, 2]])
    np.testing.assert_array_equal(function.predict({"x": [[5, 7]]}, state)["y"], [[4, 5]])


def test_loops_and_results_have_bounds(ct: Any, mb: Any, save: Callable[..., Any]) -> None:
    @mb.program(input_specs=[mb.TensorSpec((1,))], opset_version=ct.target.iOS17)
    def endless(x):  # type: ignore[no-untyped-def]
        y = mb.while_loop(
            _cond=lambda i: mb.less(x=mb.squeeze(x=i), y=1.0), _body=lambda i: (mb.mul(x=i, y=1.0),), loop_vars=(x,)
        )
        return mb.identity(x=y, name="y")

    path = save(endless, minimum_deployment_target=ct.target.iOS17)
    with pytest.raises(UserError, match="the loop did not end within 50 steps"):
        load(path, limits=Limits(loop_steps=50)).predict({"x": [0.0]})
    with pytest.raises(UserError, match=r"the prediction took longer than 0\.05 s"):
        load(path, limits=Limits(seconds=0.05)).predict({"x": [0.0]})
    with pytest.raises(UserError, match=r"2048 elements would take 8\.0 KiB, more than the bound of 4\.0 KiB"):
        Limits(memory=4096).check_elements(2048)


def test_random_operations_repeat_with_their_seed(ct: Any, mb: Any, run: Run) -> None:
    @mb.program(input_specs=[mb.TensorSpec((8,))], opset_version=ct.target.iOS17)
    def program(x):  # type: ignore[no-untyped-def]
        free = mb.random_normal(shape=np.array([8], np.int32), mean=0.0, stddev=1.0)
        fixed = mb.random_normal(shape=np.array([8], np.int32), mean=0.0, stddev=1.0, seed=7)
        return mb.mul(x=x, y=free, name="free"), mb.mul(x=x, y=fixed, name="fixed")

    package = run(program, minimum_deployment_target=ct.target.iOS17)
    one, two, other = (package.predict({"x": np.ones(8)}, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one["free"], two["free"])
    assert (one["free"] != other["free"]).all()
    np.testing.assert_array_equal(one["fixed"], other["fixed"])


SHAPES = (
    ((1, 1, 5), (5, 4)),
    ((5,), (5, 4)),
    ((3, 5), (1, 5, 1)),
    ((3, 5), (5,)),
    ((2, 3, 5), (5, 4)),
    ((1, 0), (0, 4)),
)


@pytest.mark.parametrize(("left", "right"), SHAPES)
def test_matrix_products_equal_numpys(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(left).astype(np.float32), rng.standard_normal(right).astype(np.float32)
    got = NumPyProducts().matmul(x, y)
    np.testing.assert_allclose(got, np.matmul(x, y), rtol=1e-5, atol=1e-6)
    assert got.shape == np.matmul(x, y).shape


EQUATIONS = ("nchw,nwhu->nchu", "bij,bjk->bik", "ab,cb->ac", "abc,dc->abd", "i,j->ji", "abij,abkj->aibk", "ij,j->i")


@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum_as_a_matrix_product_equals_numpys(equation: str) -> None:
    sizes = dict(zip("abcdijkhnuw", (2, 3, 4, 5, 3, 2, 4, 3, 2, 5, 4), strict=True))
    rng = np.random.default_rng(0)
    left, right = equation.partition("->")[0].split(",")
    x, y = (rng.standard_normal([sizes[c] for c in term]).astype(np.float32) for term in (left, right))
    np.testing.assert_allclose(NumPyProducts().einsum(equation, x, y), np.einsum(equation, x, y), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_equals_torchs(rank: int, groups: int, kernel: int) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, *(7, 6, 5)[:rank])).astype(np.float32)
    weight = rng.standard_normal((8, 4 // groups, *(kernel,) * rank)).astype(np.float32)
    strides, dilations = (2, 1, 1)[:rank], (1, 2, 1)[:rank]
    got = NumPyProducts().conv(x, weight, strides, ((1, 1),) * rank, dilations, groups)
    convolve = getattr(torch.nn.functional, f"conv{rank}d")
    expected = convolve(
        torch.tensor(x), torch.tensor(weight), stride=strides, padding=1, dilation=dilations, groups=groups
    )
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)
