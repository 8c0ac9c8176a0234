"""Shapes, slices, gathers and scatters against torch and against worked examples."""

from __future__ import annotations

import numpy as np
import pytest

from mlxkd.errors import UserError

torch = pytest.importorskip("torch")
F = torch.nn.functional


def _grid(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_reshape_fills_zeros_from_the_right(call) -> None:
    """The documented example: x[2, 50] to [1, 0, -1, 0] is [1, 1, 2, 50] from iOS 17 on."""
    assert call("reshape", x=_grid(2, 50), shape=np.array([1, 0, -1, 0])).shape == (1, 1, 2, 50)
    assert call("reshape", x=_grid(2, 3, 4), shape=np.array([0, -1])).shape == (3, 8)
    assert call("reshape", x=_grid(2, 3), shape=np.array([0, 3])).shape == (2, 3)


def test_reshape_like_joins_parts_of_shapes(call) -> None:
    got = call(
        "reshape_like",
        x=_grid(180),
        ref_tensors=(_grid(2, 3, 4), _grid(1, 5, 6)),
        begins=(0, 1),
        ends=(2, 0),
        end_masks=(False, True),
    )
    assert got.shape == (2, 3, 5, 6)


@pytest.mark.parametrize(
    "name,inputs,oracle",
    [
        ("transpose", {"perm": [2, 0, 1]}, lambda x: x.permute(2, 0, 1)),
        ("expand_dims", {"axes": [0, -1]}, lambda x: x[None, ..., None]),
        ("squeeze", {}, torch.squeeze),
        ("flatten2d", {"axis": -1}, lambda x: x.reshape(6, 4)),
        ("flatten2d", {"axis": 1}, lambda x: x.reshape(2, 12)),
        ("tile", {"reps": [1, 2, 3]}, lambda x: x.repeat(1, 2, 3)),
        ("reverse", {"axes": [0, 2]}, lambda x: x.flip(0, 2)),
        ("reverse", {}, lambda x: x.flip(0, 1, 2)),
        ("sliding_windows", {"axis": 2, "size": 3, "stride": 1}, lambda x: x.unfold(2, 3, 1)),
        ("sliding_windows", {"axis": 1, "size": 2, "stride": 1}, lambda x: x.unfold(1, 2, 1).permute(0, 1, 3, 2)),
        ("cumsum", {"axis": 1}, lambda x: x.cumsum(1)),
        ("cumsum", {"axis": 1, "reverse": True}, lambda x: x.flip(1).cumsum(1).flip(1)),
        ("cumsum", {"axis": 2, "exclusive": True}, lambda x: x.cumsum(2) - x),
        ("band_part", {"lower": -1, "upper": 0}, torch.tril),
        ("band_part", {"lower": 0, "upper": -1}, torch.triu),
        ("band_part", {"lower": 1, "upper": 2}, lambda x: x.tril(2).triu(-1)),
        ("slice_by_size", {"begin": [0, 1, -2], "size": [2, -1, 1]}, lambda x: x[:, 1:, -2:-1]),
        ("pad", {"pad": [1, 2, 0, 1], "constant_val": 9.0}, lambda x: F.pad(x, (0, 1, 1, 2), value=9.0)),
        ("pad", {"pad": [2, 1], "mode": "reflect"}, lambda x: F.pad(x, (2, 1), mode="reflect")),
        ("pad", {"pad": [2, 1], "mode": "replicate"}, lambda x: F.pad(x, (2, 1), mode="replicate")),
    ],
)  # fmt: skip
def test_like_torch(call, name: str, inputs: dict, oracle) -> None:
    x = _grid(2, 3, 4)
    np.testing.assert_array_equal(call(name, x=x, **inputs), oracle(torch.tensor(x)).numpy())


def test_concat_interleaves_rows(call) -> None:
    """The documented example; coremltools' own constant folding ignores the flag."""
    first, second = np.array([[1, 2], [3, 4], [5, 6]]), np.array([[7, 8], [9, 10], [11, 12]])
    got = call("concat", values=(first, second), axis=0, interleave=True)
    assert got.tolist() == [[1, 2], [7, 8], [3, 4], [9, 10], [5, 6], [11, 12]]
    wide = call("concat", values=(first, second), axis=-1, interleave=True)
    assert wide.tolist() == [[1, 7, 2, 8], [3, 9, 4, 10], [5, 11, 6, 12]]


def test_split_and_stack(call) -> None:
    x = _grid(2, 6)
    assert [p.shape for p in call("split", x=x, axis=1, num_splits=3)] == [(2, 2)] * 3
    parts = call("split", x=x, axis=-1, split_sizes=np.array([1, 2, 3]))
    assert [p.shape for p in parts] == [(2, 1), (2, 2), (2, 3)]
    np.testing.assert_array_equal(call("concat", values=tuple(parts), axis=1), x)
    np.testing.assert_array_equal(call("stack", values=(x, x + 1), axis=1), np.stack([x, x + 1], 1))


SLICES = [
    ({"begin": [0, 1, 0], "end": [2, 3, 4]}, np.s_[0:2, 1:3, 0:4]),
    ({"begin": [0, 0, 3], "end": [2, 3, 0], "stride": [1, 2, -1]}, np.s_[0:2, 0:3:2, 3:0:-1]),
    ({"begin": [5, 1, 0], "end": [0, 0, -1], "begin_mask": [1, 0, 0], "end_mask": [1, 1, 0]}, np.s_[:, 1:, 0:-1]),
    ({"begin": [1, 0, 0], "end": [0, 3, 4], "squeeze_mask": [1, 0, 0]}, np.s_[1, 0:3, 0:4]),
    (
        {"begin": [0] * 3, "end": [2, 3, 0], "stride": [1, 1, -2], "begin_mask": [0, 0, 1], "end_mask": [0, 0, 1]},
        np.s_[0:2, 0:3, ::-2],
    ),
]  # fmt: skip


@pytest.mark.parametrize("inputs,index", SLICES)
def test_slice_by_index_and_its_update(call, inputs: dict, index: tuple) -> None:
    x = _grid(2, 3, 4)
    got = call("slice_by_index", x=x, **inputs)
    np.testing.assert_array_equal(got, x[index])
    expected = x.copy()
    expected[index] = -1
    before = x.copy()
    np.testing.assert_array_equal(call("slice_update", x=x, update=np.full(got.shape, -1.0), **inputs), expected)
    np.testing.assert_array_equal(x, before)


def test_slice_update_refuses_to_broadcast(call) -> None:
    with pytest.raises(UserError, match=r"the update has shape \(1, 4\), the slice \(2, 4\)"):
        call("slice_update", x=_grid(3, 4), update=_grid(1, 4), begin=[0, 0], end=[2, 4])


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gather_along_any_axis(call, axis: int) -> None:
    x, indices = _grid(3, 4, 5), np.array([[2, -1], [0, 1]], np.int32)
    np.testing.assert_array_equal(call("gather", x=x, indices=indices, axis=axis), np.take(x, indices, axis))
    assert call("gather", x=x, indices=np.array(1), axis=axis).ndim == 2


def test_gather_with_batches_goes_row_by_row(call) -> None:
    x, indices = _grid(2, 3, 4), np.array([[0, 2], [1, 1]])
    got = call("gather", x=x, indices=indices, axis=1, batch_dims=1)
    np.testing.assert_array_equal(got, np.stack([x[0][[0, 2]], x[1][[1, 1]]]))
    nd = call("gather_nd", x=x, indices=np.array([[[0, 1]], [[2, 3]]]), batch_dims=1)
    assert nd.tolist() == [[x[0, 0, 1]], [x[1, 2, 3]]]


def test_gather_outside_is_refused_by_operation(call) -> None:
    with pytest.raises(UserError, match="operation 'gather': index 9 is outside an axis of length 3"):
        call("gather", x=_grid(3), indices=np.array([0, 9]))


def test_scatter_applies_repeated_indices(call) -> None:
    data, updates = np.zeros((2, 3), np.float32), np.array([[1, 2], [3, 4]], np.float32)
    indices = np.array([[0, 0], [2, -1]])
    got = call("scatter_along_axis", data=data, indices=indices, updates=updates, axis=1, mode="add")
    assert got.tolist() == [[3, 0, 0], [0, 0, 7]]
    rows = call("scatter", data=np.ones((3, 2), np.float32), indices=np.array([1, 1]), updates=updates, mode="mul")
    assert rows.tolist() == [[1, 1], [3, 8], [1, 1]]
    nd = call("scatter_nd", data=data, indices=np.array([[0, 1], [1, 2]]), updates=np.array([5.0, 6.0]), mode="update")
    assert nd.tolist() == [[0, 5, 0], [0, 0, 6]]
    assert not data.any()


@pytest.mark.parametrize("mode,reduce", [("add", "sum"), ("mul", "prod"), ("max", "amax"), ("min", "amin")])
def test_scatter_along_axis_like_torch(call, rng, mode: str, reduce: str) -> None:
    data, updates = rng.standard_normal((4, 5)).astype(np.float32), rng.standard_normal((2, 5)).astype(np.float32)
    indices = rng.integers(0, 4, (2, 5))
    expected = torch.tensor(data).scatter_reduce(0, torch.tensor(indices), torch.tensor(updates), reduce)
    got = call("scatter_along_axis", data=data, indices=indices, updates=updates, axis=0, mode=mode)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)


def test_reverse_sequence_reverses_only_the_beginning(call) -> None:
    x = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)
    got = call("reverse_sequence", x=x, lengths=np.array([3, 2]), seq_axis=1, batch_axis=0)
    assert got.tolist() == [[3, 2, 1, 4], [6, 5, 7, 8]]
    across = call("reverse_sequence", x=x.T, lengths=np.array([3, 2]), seq_axis=0, batch_axis=1)
    np.testing.assert_array_equal(across, got.T)


@pytest.mark.parametrize("ascending", [False, True])
def test_sorting_is_stable_in_both_directions(call, ascending: bool) -> None:
    x = np.array([[2, 1, 2, 3, 1]], np.float32)
    order = torch.sort(torch.tensor(x), dim=1, descending=not ascending, stable=True).indices.numpy()
    np.testing.assert_array_equal(call("argsort", x=x, axis=1, ascending=ascending), order)
    values, indices = call("topk", x=x, k=3, axis=1, ascending=ascending)
    np.testing.assert_array_equal(indices, order[:, :3])
    np.testing.assert_array_equal(values, np.take_along_axis(x, order[:, :3], 1))
    assert call("topk", x=x, k=-1, return_indices=False).shape == (1, 5)


def test_makers(call) -> None:
    assert call("fill", shape=np.array([2, 1]), value=np.int32(3)).tolist() == [[3], [3]]
    assert call("fill_like", ref_tensor=_grid(2), value=True).tolist() == [True, True]
    assert call("range_1d", start=np.int32(2), end=np.int32(9), step=np.int32(3)).tolist() == [2, 5, 8]
    assert call("range_1d", start=np.int32(5), end=np.int32(0), step=np.int32(-2)).tolist() == [5, 3, 1]
    assert call("shape", x=_grid(2, 3)).tolist() == [2, 3]
    assert call("non_zero", x=np.array([[0, 1], [2, 0]])).tolist() == [[0, 1], [1, 0]]
    assert call("crop", x=_grid(1, 4, 5), crop_height=[1, 0], crop_width=[0, 2]).shape == (1, 3, 3)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_one_hot(call, axis: int) -> None:
    indices = np.array([[0, 2], [1, 5]])
    got = call("one_hot", indices=indices, one_hot_vector_size=np.int32(3), axis=axis, on_value=2.0, off_value=-1.0)
    expected = np.moveaxis(np.where(indices[..., None] == np.arange(3), 2.0, -1.0), -1, axis)
    np.testing.assert_array_equal(got, expected)
