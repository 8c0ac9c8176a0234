"""Random draws by their distribution, quantisation against torch, detection by worked examples."""

from __future__ import annotations

import numpy as np
import pytest

from mlxkd.errors import UserError

torch = pytest.importorskip("torch")


def test_random_draws_follow_their_laws(call) -> None:
    """20,000 draws: the bounds are five standard errors wide, so chance fails one run in a million."""
    shape = np.array([200, 100])
    coins = call("random_bernoulli", shape=shape, prob=0.3, seed=1)
    assert abs(coins.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 20000)
    flat = call("random_uniform", shape=shape, low=np.float32(-2), high=np.float32(4), seed=1)
    assert flat.min() >= -2 and flat.max() < 4 and abs(flat.mean() - 1) < 5 * np.sqrt(3 / 20000)
    bell = call("random_normal", shape=shape, mean=np.float32(3), stddev=np.float32(0.5), seed=1)
    assert abs(bell.mean() - 3) < 5 * 0.5 / np.sqrt(20000) and abs(bell.std() - 0.5) < 0.02
    for mode, x in (("probs", [0.1, 0.0, 0.9]), ("logits", np.log([0.1, 1e-30, 0.9]))):
        draws = call("random_categorical", x=np.array([x], np.float32), mode=mode, size=20000, seed=2)
        assert draws.shape == (1, 20000)
        shares = np.bincount(draws[0], minlength=3) / 20000
        assert shares[1] == 0 and abs(shares[0] - 0.1) < 5 * np.sqrt(0.09 / 20000)


def test_a_seed_repeats_and_no_seed_moves_on(call) -> None:
    shape = np.array([4])
    draw = lambda seed: call("random_normal", shape=shape, seed=seed).tolist()  # noqa: E731
    assert draw(5) == draw(5) != draw(6)


@pytest.mark.parametrize("name,dtype", [("uint8", torch.quint8), ("int8", torch.qint8)])
def test_quantize_like_torch(call, rng, name: str, dtype) -> None:
    x = rng.standard_normal((3, 4, 5)).astype(np.float32) * 3
    scales, zeros = np.array([0.5, 0.02, 0.125, 1.0], np.float32), np.array([3, 7, 0, 1], name)
    expected = torch.quantize_per_channel(torch.tensor(x), torch.tensor(scales), torch.tensor(zeros).long(), 1, dtype)
    codes = call("quantize", input=x, scale=scales, zero_point=zeros, axis=1, output_dtype=name)
    assert codes.dtype == name
    np.testing.assert_array_equal(codes, expected.int_repr().numpy())
    back = call("dequantize", input=codes, scale=scales, zero_point=zeros, axis=1)
    np.testing.assert_allclose(back, expected.dequantize().numpy(), rtol=1e-6)
    plain = call("dequantize", input=codes, scale=np.float32(0.5))
    np.testing.assert_array_equal(plain, codes * np.float32(0.5))


def test_suppression_keeps_the_best_of_overlapping_boxes(call) -> None:
    boxes = np.array([[[0, 0, 2, 2], [0.1, 0, 2, 2], [5, 5, 2, 2], [0, 0.1, 2, 2]]], np.float32)
    scores = np.array([[[0.5, 0.1], [0.9, 0.2], [0.3, 0.4], [0.1, 0.8]]], np.float32)
    limits = {"iou_threshold": np.float32(0.5), "max_boxes": 4}
    common = {"boxes": boxes, "scores": scores, **limits, "score_threshold": np.float32(0.35)}
    kept, marks, indices, count = call("non_maximum_suppression", opset="ios16", **common)
    assert indices.tolist() == [[1, 2, -1, -1]] and count.tolist() == [2]
    np.testing.assert_array_equal(kept[0, :2], boxes[0, [1, 2]])
    assert not kept[0, 2:].any() and not marks[0, 2:].any()
    _, _, apart, _ = call("non_maximum_suppression", opset="ios16", per_class_suppression=True, **common)
    assert apart.tolist() == [[1, 3, 2, -1]]
    late, _, order = call("non_maximum_suppression", boxes=boxes.swapaxes(1, 2), scores=scores.swapaxes(1, 2), **limits)
    assert late.shape == (1, 4, 4) and order.tolist() == [[1, 2, -1, -1]]


def test_classify_names_the_best(call) -> None:
    label, share = call("classify", probabilities=np.array([[0.25, 0.75]], np.float32), classes=("cat", "dog"))
    assert label == "dog" and share == {"cat": 0.25, "dog": 0.75}


HUGE = 1 << 40
HOSTILE = {
    "fill": {"shape": [HUGE]},
    "tile": {"x": np.zeros(2, np.float32), "reps": [HUGE]},
    "range_1d": {"start": np.float32(0), "end": np.float32(HUGE), "step": np.float32(1)},
    "one_hot": {"indices": np.zeros(2, np.int32), "one_hot_vector_size": np.int64(HUGE)},
    "pad": {"x": np.zeros(2, np.float32), "pad": [HUGE, HUGE]},
    "random_normal": {"shape": [HUGE]},
    "resize_bilinear": {"x": np.zeros((1, 1, 1), np.float32), "target_size_height": HUGE},
    "upsample_nearest_neighbor": {"x": np.zeros((1, 1, 1), np.float32), "scale_factor_width": np.float32(HUGE)},
    "add": {"x": np.zeros((1 << 20, 1), np.float32), "y": np.zeros((1, 1 << 20), np.float32)},
    "matmul": {"x": np.zeros((1 << 20, 1), np.float32), "y": np.zeros((1, 1 << 20), np.float32)},
    "max_pool": {
        "x": np.zeros((1, 1, 4), np.float32),
        "kernel_sizes": [1],
        "pad_type": "custom",
        "pad": [HUGE, HUGE],
    },
    "conv": {
        "x": np.zeros((1, 1, 4), np.float32),
        "weight": np.zeros((1, 1, 1), np.float32),
        "pad_type": "custom",
        "pad": [HUGE, 0],
    },
    "conv_transpose": {
        "x": np.zeros((1, 1, 4), np.float32),
        "weight": np.zeros((1, 1, 1), np.float32),
        "strides": [HUGE],
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_result_beyond_memory_is_refused_before_it_is_made(call, name: str) -> None:
    with pytest.raises(UserError, match="elements would take"):
        call(name, **HOSTILE[name])
