"""Bundles fulfil the session contract: both cache layouts, rings that wrap, several packages, batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from session_contract import Factory, SessionContract, last_rows, tokens_for

from ane.convert.check import check, divergence, reference
from ane.convert.export import export
from ane.convert.options import Options
from ane.runtime import open_session
from ane.runtime.bundle_session import BundleSession
from ane.runtime.mil_session import open_package
from mlxkd.decode.session import CannotRewind
from mlxkd.errors import UserError

CONTEXT = 64


Bundles = Callable[[Path, Options], Factory]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Exports and opens each bundle once; sessions share the packages and have states of their own."""
    made: dict[str, Factory] = {}

    def make(folder: Path, options: Options) -> Factory:
        key = f"{folder} {options}"
        if key not in made:
            out = tmp_path_factory.mktemp("contract") / "bundle"
            manifest = export(folder, out, options)
            packages = [open_package(out / package.file) for package in manifest.packages]
            made[key] = lambda batch_size=1, max_context=None: BundleSession(out, manifest, packages, batch_size)
        return made[key]

    return make


class BundleContract(SessionContract):
    tolerance = 2e-2  # float16 logits of a few units, and the new tokens' own softmax in the explicit layout
    family: ClassVar[str] = "llama"
    options: ClassVar[dict[str, Any]] = {}
    changes: ClassVar[dict[str, Any]] = {"num_hidden_layers": 2}

    @pytest.fixture
    def factory(self, toy: Any, bundles: Bundles) -> Factory:
        options = Options(context=CONTEXT, prefill=8, batch=(1, 2, 3), **self.options)
        return bundles(toy(self.family, **self.changes), options)


class TestState(BundleContract):
    pass


class TestExplicitInTwoPackages(BundleContract):
    family = "qwen3"
    options: ClassVar[dict[str, Any]] = {"kv": "explicit", "chunks": 2, "positions": "model"}


class TestRing(BundleContract):
    """A window of 5 in a ring of 32 slots: every test of a full context wraps."""

    family = "gemma3_text"
    options: ClassVar[dict[str, Any]] = {"rewind": 12, "positions": "model"}
    changes: ClassVar[dict[str, Any]] = {"sliding_window": 5, "num_hidden_layers": 3}


class TestExplicitRing(BundleContract):
    family = "gemma3_text"
    options: ClassVar[dict[str, Any]] = {"rewind": 12, "kv": "explicit"}
    changes: ClassVar[dict[str, Any]] = {"sliding_window": 5, "num_hidden_layers": 3}


def test_a_ring_goes_back_as_far_as_it_was_built_for(toy: Any, tmp_path: Path) -> None:
    folder = toy("gemma3_text", sliding_window=5, num_hidden_layers=3)
    export(folder, tmp_path / "bundle", Options(context=128, prefill=8, rewind=12))
    session, straight = (open_session(tmp_path / "bundle", "mil") for _ in range(2))
    assert session.manifest.packages[0].caches[1].ring == 32
    tokens = tokens_for(session, 100)
    session.extend(tokens[None])
    straight.extend(tokens[None, :88])
    session.rewind([88])
    np.testing.assert_allclose(last_rows(session, tokens[:9]), last_rows(straight, tokens[:9]), atol=1e-2)
    with pytest.raises(CannotRewind, match="cannot go back from 97 to 40 tokens"):
        session.rewind([40])
    assert session.lengths.tolist() == [97]


@pytest.mark.parametrize("batch", [2, 4])
def test_rows_of_a_batch_with_a_rewind_follow_mlx(batch: int, toy: Any, tmp_path: Path) -> None:
    folder = toy("mistral")
    export(folder, tmp_path / "bundle", Options(context=96, prefill=8, batch=(1, 2, 4), verify=3))
    theirs, ours = reference(folder, batch), open_session(tmp_path / "bundle", "mil", batch)
    assert ours.query_sizes == (1, 3, 8)
    tokens = np.random.default_rng(5).integers(0, 96, (batch, 13))
    counts = [13, 4, 9, 1][:batch]
    for session in (theirs, ours):
        session.extend(tokens, counts)
        session.rewind([c - min(3, c - 1) for c in counts])
    for _ in range(20):
        following = np.random.default_rng(6).integers(0, 96, (batch, 3))
        assert divergence(np.array(theirs.extend(following)), ours.extend(following)) < 1e-3


def test_an_argmax_head_gives_the_greedy_token(toy: Any, tmp_path: Path) -> None:
    folder = toy("llama")
    export(folder, tmp_path / "bundle", Options(context=64, prefill=8, head="argmax", head_width=40))
    theirs, ours = reference(folder), open_session(tmp_path / "bundle", "mil")
    tokens = np.random.default_rng(2).integers(0, 96, (1, 20))
    expected, got = np.array(theirs.extend(tokens)), ours.extend(tokens)
    assert (got.argmax(-1) == expected.argmax(-1)).all()
    np.testing.assert_allclose(got.max(-1), expected.max(-1), atol=1e-2)
    assert np.isfinite(got).sum() == 20 * 3  # one candidate per split of 40, 40 and 16 rows
    outcome = check(folder, tmp_path / "bundle", 4)
    assert outcome.passed and outcome.text() == "greedy tokens: 4 of 4 identical to MLX, no KL (an argmax head)"


def test_a_batch_size_that_was_not_exported_is_refused(toy: Any, tmp_path: Path) -> None:
    export(toy("llama"), tmp_path / "bundle", Options(context=32, prefill=8, batch=(1, 4)))
    with pytest.raises(UserError, match="batch 2 was not exported; the bundle has 1, 4"):
        open_session(tmp_path / "bundle", "mil", 2)
    with pytest.raises(UserError, match="backend 'tpu' is not one of auto, mil, coreml"):
        open_session(tmp_path / "bundle", "tpu")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"not a bundle: manifest\.json is missing"):
        open_session(tmp_path, "mil")
