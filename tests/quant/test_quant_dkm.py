"""Differentiable palettes against coremltools' DKM palettizer (torch autograd) and in bounded memory."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxkd.quant import dkm
from mlxkd.runtime import quiet_coremltools

RNG = np.random.default_rng(5)


def apples(weight: np.ndarray, centroids: np.ndarray, bits: int, cotangent: np.ndarray) -> tuple[np.ndarray, ...]:
    """Forward, gradient and centroids of coremltools' own differentiable palettisation of one tensor."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("coremltools")
    with quiet_coremltools():
        from coremltools.optimize.torch.palettization.fake_palettize import FakePalettize
        from torch.ao.quantization.observer import MovingAverageMinMaxObserver

        options = {"palett_tau": dkm.TAU, "palett_epsilon": 0.0, "kmeans_max_iter": dkm.ITERATIONS}
        fake = FakePalettize(
            MovingAverageMinMaxObserver.with_args(quant_min=-128, quant_max=127, dtype=torch.qint8),
            n_bits=bits,
            cluster_dim=1,
            advanced_options={**options, "prune_threshold": 0.0},
        )
    w = torch.tensor(weight, requires_grad=True)
    fake.train()
    fake.enable_fake_palett(True)
    fake.partitions, fake.partition_numel = [torch.arange(len(w))], torch.tensor([w.numel()])
    fake.centroids, fake.labels = [torch.tensor(centroids)[:, None]], [None]
    fake.enable_partition, fake.enforce_zero = torch.tensor([True]), [False]
    fake.cum_inertia = [0.0]
    out = fake.diff_palettize(w.clone())
    out.backward(torch.tensor(cotangent))
    return out.detach().numpy(), w.grad.numpy(), fake.centroids[0][:, 0].numpy()


@pytest.mark.parametrize("bits", [2, 3])
def test_value_gradient_and_palette_match_coremltools(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dkm, "CHUNK", 100)  # several uneven chunks
    weight = (RNG.standard_normal((24, 32)) * 0.02).astype(np.float32)
    cotangent = RNG.standard_normal(weight.shape).astype(np.float32)
    centroids = np.quantile(weight, (np.arange(2**bits) + 0.5) / 2**bits).astype(np.float32)
    theirs, gradient, moved = apples(weight, centroids, bits, cotangent)

    def run(w: mx.array) -> mx.array:
        return dkm.soft_palette(w.reshape(1, -1), mx.array(centroids)[None])[0].reshape(w.shape)

    (ours,), (dw,) = mx.vjp(run, [mx.array(weight)], [mx.array(cotangent)])
    palette = dkm.soft_palette(mx.array(weight).reshape(1, -1), mx.array(centroids)[None])[1]
    np.testing.assert_allclose(np.array(ours), theirs, atol=1e-6)
    np.testing.assert_allclose(np.array(palette)[0], moved, atol=1e-6)
    np.testing.assert_allclose(np.array(dw), gradient, atol=2e-4 * np.abs(gradient).max())


def test_memory_does_not_hold_weights_times_entries() -> None:
    groups, entries = mx.random.normal((1, 1 << 20)), 16
    palette = mx.sort(mx.random.normal((1, entries)), axis=-1)
    mx.eval(groups, palette)
    mx.clear_cache()
    mx.reset_peak_memory()
    base = mx.get_active_memory()
    mx.eval(mx.grad(lambda g: mx.sum(dkm.soft_palette(g, palette)[0] ** 2))(groups))
    plain = groups.nbytes * entries * dkm.ITERATIONS  # what autograd would keep: one attention per iteration
    assert mx.get_peak_memory() - base < plain / 2
