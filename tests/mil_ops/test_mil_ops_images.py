"""Image operations against torch's interpolate, grid_sample and pixel_shuffle, and documented examples."""

from __future__ import annotations

import numpy as np
import pytest

from mlxkd.errors import UserError

torch = pytest.importorskip("torch")
F = torch.nn.functional


def _t(x: np.ndarray):
    return torch.tensor(np.asarray(x)).double()


@pytest.fixture
def image(rng) -> np.ndarray:
    return rng.standard_normal((2, 3, 5, 7)).astype(np.float32)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("factors", [(2, 3), (1.5, 0.75)])
def test_bilinear_like_torch(call, image, align: bool, factors: tuple[float, float]) -> None:
    expected = F.interpolate(
        _t(image), scale_factor=factors, mode="bilinear", align_corners=align, recompute_scale_factor=True
    ).numpy()
    height, width = np.float32(factors[0]), np.float32(factors[1])
    got = call("upsample_bilinear", x=image, scale_factor_height=height, scale_factor_width=width, align_corners=align)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    mode = "STRICT_ALIGN_CORNERS" if align else "UNALIGN_CORNERS"
    sizes = {"target_size_height": expected.shape[2], "target_size_width": expected.shape[3]}
    np.testing.assert_allclose(call("resize_bilinear", x=image, sampling_mode=mode, **sizes), expected, atol=1e-6)
    shape = np.array([0, *expected.shape[2:]])
    both = call("resize", x=image, shape=shape, resized_dims=np.uint32(2), sampling_mode=mode)
    np.testing.assert_allclose(both, expected, atol=1e-6)


def test_nearest_like_torch(call, image) -> None:
    for height, width in ((10, 14), (3, 4), (7, 5)):
        got = call("resize_nearest_neighbor", x=image, target_size_height=height, target_size_width=width)
        np.testing.assert_array_equal(got, F.interpolate(_t(image), (height, width), mode="nearest").numpy())
    got = call("upsample_nearest_neighbor", x=image, scale_factor_height=np.float32(2), scale_factor_width=2)
    np.testing.assert_array_equal(got, F.interpolate(_t(image), scale_factor=2, mode="nearest").numpy())


# The grids documented for Xin = 2 with pixels 0 and 1.
@pytest.mark.parametrize(
    "mode,five",
    [
        ("UNALIGN_CORNERS", [0.0, 0.1, 0.5, 0.9, 1.0]),
        ("STRICT_ALIGN_CORNERS", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("ALIGN_CORNERS", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("DEFAULT", [0.0, 0.4, 0.8, 1.0, 1.0]),
        ("OFFSET_CORNERS", [0.1, 0.3, 0.5, 0.7, 0.9]),
    ],
)
def test_documented_sampling_grids(call, mode: str, five: list[float]) -> None:
    x = np.array([[[0.0, 1.0]]], np.float32)
    got = call("resize_bilinear", x=x, target_size_height=1, target_size_width=5, sampling_mode=mode)
    np.testing.assert_allclose(got.ravel(), five, atol=1e-7)
    alone = call("resize_bilinear", x=x, target_size_height=1, target_size_width=1, sampling_mode="ALIGN_CORNERS")
    assert alone.ravel().tolist() == [0.5]


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("sampling", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding", ["constant", "border", "reflection"])
def test_resample_like_grid_sample(call, rng, image, sampling: str, padding: str, align: bool) -> None:
    places = rng.uniform(-1.7, 1.7, (2, 4, 6, 2)).astype(np.float32)
    if padding == "reflection" and not align:
        padding, torch_padding = "symmetric", "reflection"  # torch reflects at the edge of the pixels then
    else:
        torch_padding = {"constant": "zeros"}.get(padding, padding)
    expected = F.grid_sample(_t(image), _t(places), sampling, torch_padding, align)
    got = call(
        "resample",
        x=image,
        coordinates=places,
        sampling_mode=sampling,
        padding_mode=padding,
        padding_value=np.float32(0),
        coordinates_mode="normalized_minus_one_to_one",
        align_corners=align,
    )
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)


def test_affine_like_affine_grid(call, image, rng) -> None:
    matrix = rng.standard_normal((2, 6)).astype(np.float32)
    grid = F.affine_grid(_t(matrix).reshape(2, 2, 3), [2, 3, 4, 6], align_corners=True)
    got = call(
        "affine",
        x=image,
        transform_matrix=matrix,
        output_height=4,
        output_width=6,
        sampling_mode="bilinear",
        padding_mode="constant",
        padding_value=np.float32(0),
        coordinates_mode="normalized_minus_one_to_one",
        align_corners=True,
    )
    np.testing.assert_allclose(got, F.grid_sample(_t(image), grid, align_corners=True).numpy(), atol=1e-5)


def test_crop_resize_orders_and_versions(call) -> None:
    x = np.arange(1, 17, dtype=np.float32).reshape(1, 1, 4, 4)
    common = {"target_height": 2, "target_width": 2, "sampling_mode": "ALIGN_CORNERS"}
    orders = {
        "CORNERS_HEIGHT_FIRST": [1, 0, 2, 3],
        "CORNERS_WIDTH_FIRST": [0, 1, 3, 2],
        "CENTER_SIZE_HEIGHT_FIRST": [1.5, 1.5, 1, 3],
        "CENTER_SIZE_WIDTH_FIRST": [1.5, 1.5, 3, 1],
    }
    for order, box in orders.items():
        got = call("crop_resize", x=x, boxes=np.array([box], np.float32), box_coordinate_mode=order, **common)
        assert got.ravel().tolist() == [5, 8, 9, 12]
    roi = np.array([[0, 1, 0, 2, 3]], np.float32).reshape(1, 1, 5, 1, 1)
    old = call("crop_resize", opset="ios16", x=x, roi=roi, **common)
    assert old.shape == (1, 1, 1, 2, 2) and old.ravel().tolist() == [5, 8, 9, 12]
    outside = np.array([[0, 0, 2, 1]], np.float32)
    padded = call("crop_resize", x=x, boxes=outside, normalized_coordinates=True, pad_value=np.float32(9), **common)
    assert padded.ravel().tolist() == [1, 4, 9, 9]
    with pytest.raises(UserError, match="leaves normalised boxes outside"):
        call("crop_resize", opset="ios15", x=x, roi=roi[:, :, 1:], normalized_coordinates=True, **common)


def test_blocks(call, rng) -> None:
    x = rng.standard_normal((2, 8, 3, 4)).astype(np.float32)
    shuffled = call("pixel_shuffle", x=x, upscale_factor=2)
    np.testing.assert_array_equal(shuffled, F.pixel_shuffle(torch.tensor(x), 2).numpy())
    np.testing.assert_array_equal(call("pixel_unshuffle", x=shuffled, downscale_factor=2), x)
    # TensorFlow's documented example, in NCHW: the four channels become one 2x2 block.
    one = np.array([1, 2, 3, 4], np.float32).reshape(1, 4, 1, 1)
    assert call("depth_to_space", x=one, block_size=2).tolist() == [[[[1, 2], [3, 4]]]]
    np.testing.assert_array_equal(call("space_to_depth", x=call("depth_to_space", x=x, block_size=2), block_size=2), x)
    two = np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1)
    assert call("depth_to_space", x=two, block_size=2)[0, :, 0, 0].tolist() == [0, 1]


def test_space_to_batch_as_documented_by_tensorflow(call, rng) -> None:
    x = np.arange(1, 17, dtype=np.float32).reshape(1, 1, 4, 4)
    block = np.array([2, 2])
    split = call("space_to_batch", x=x, block_shape=block, paddings=np.zeros((2, 2), np.int32))
    assert split.reshape(4, 4).tolist() == [[1, 3, 9, 11], [2, 4, 10, 12], [5, 7, 13, 15], [6, 8, 14, 16]]
    y = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    edges = np.array([[1, 1], [0, 1]])
    there = call("space_to_batch", x=y, block_shape=np.array([3, 2]), paddings=edges)
    np.testing.assert_array_equal(call("batch_to_space", x=there, block_shape=np.array([3, 2]), crops=edges), y)
