"""The Core ML session through a fake at its lowest boundary, ``predict`` and ``make_state``, driven by the MIL runtime.

The macOS-marked tests at the end run the same contract on Core ML itself.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from decode_models import tiny
from mlx.utils import tree_flatten
from session_contract import Factory, SessionContract
from table_session import PlainTokenizer

from ane.convert.bundle import read_manifest
from ane.convert.export import export
from ane.convert.options import Options
from ane.mil.package import Package, load
from ane.runtime import open_session
from ane.runtime.bundle_session import BundleSession
from ane.runtime.coreml import CoreMLPackage, Units, load_function, open_package
from ane.runtime.coreml_cache import CompiledModels, compile_package
from mlxkd.decode.draft_length import AdaptiveLength, FixedLength
from mlxkd.decode.drafting import ModelDrafter, NgramDrafter
from mlxkd.decode.engine import Engine
from mlxkd.decode.generate import collect, complete
from mlxkd.decode.mlx_session import MlxSession
from mlxkd.decode.prompt_cache import PromptCache
from mlxkd.decode.requests import GenerateOptions, Request
from mlxkd.errors import UserError

OPTIONS = GenerateOptions(max_tokens=12, stop_tokens=frozenset())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of compiled models shared by the tests that do not look into it."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama, exported for 1 and 3 rows with calls of 1, 4 and 16 tokens."""
    options = Options(context=64, prefill=16, verify=4, batch=(1, 2, 3))
    return exported(tmp_path_factory.mktemp("bundle"), "llama", options)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random gemma3 whose window of 5 lies in a ring of 32 slots, which any full context wraps."""
    options = Options(context=64, prefill=8, batch=(1, 2, 3), rewind=12)
    return exported(tmp_path_factory.mktemp("windowed"), "gemma3", options)


def exported(folder: Path, name: str, options: Options) -> Path:
    """The bundle of a tiny model in float16."""
    model, config = tiny(name)
    source = folder / "model"
    source.mkdir()
    weights = {name: value.astype(mx.float16) for name, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    (source / "config.json").write_text(json.dumps(config))
    export(source, folder / "out", options)
    return folder / "out"


@functools.lru_cache
def loaded(package: Path) -> Package:
    """Decoded once for all sessions of a test run."""
    return load(package)


class FakeCompiled:
    """``CompiledMLModel`` as it behaves: float32 or int32 in, the caller's buffers not kept, states by name."""

    def __init__(self, compiled: Path, function: str, units: Units):
        self._function = loaded(compiled / "package.mlpackage").function(function)

    def predict(self, data: dict[str, np.ndarray], state: Any | None = None) -> Mapping[str, np.ndarray]:
        for name, value in data.items():
            assert value.dtype in (np.float32, np.int32) and value.flags.c_contiguous, name
        return self._function.predict({name: value.copy() for name, value in data.items()}, state)

    def make_state(self) -> Any:
        return self._function.make_state()


def copy_package(package: Path, target: Path) -> None:
    """Stands in for the compiler, which exists on macOS only."""
    shutil.copytree(package, target / "package.mlpackage")


def fake_session(bundle: Path, root: Path, batch: int) -> BundleSession:
    manifest = read_manifest(bundle)
    models = CompiledModels(root, compiler=copy_package)
    packages = [CoreMLPackage(bundle / p.file, "cpu_and_ne", models, FakeCompiled) for p in manifest.packages]
    return BundleSession(bundle, manifest, packages, batch)


class TestCoreMLSession(SessionContract):
    tolerance = 2e-2  # float16 keys, values and logits

    @pytest.fixture
    def factory(self, bundle: Path, compiled: Path) -> Factory:
        return lambda batch_size=1, max_context=None: fake_session(bundle, compiled, batch_size)


class TestSlidingWindow(SessionContract):
    tolerance = 2e-2

    @pytest.fixture
    def factory(self, windowed: Path, compiled: Path) -> Factory:
        assert any(cache.ring == 32 for package in read_manifest(windowed).packages for cache in package.caches)
        return lambda batch_size=1, max_context=None: fake_session(windowed, compiled, batch_size)


@pytest.mark.parametrize(("name", "made"), [("llama", "bundle"), ("gemma3", "windowed")])
def test_greedy_text_is_that_of_mlx(name: str, made: str, compiled: Path, request: pytest.FixtureRequest) -> None:
    """45 tokens: the window's ring wraps."""
    model, config = tiny(name)
    options = GenerateOptions(max_tokens=45, stop_tokens=frozenset())
    expected = complete(Engine(MlxSession(model, config), PlainTokenizer()), [5, 7, 9], options)
    session = fake_session(request.getfixturevalue(made), compiled, 1)
    found = complete(Engine(session, PlainTokenizer()), [5, 7, 9], options)
    assert found.tokens == expected.tokens


def test_speculation_across_backends_changes_nothing(bundle: Path, compiled: Path) -> None:
    """Worker on Core ML with a drafter on MLX, and the other way round; lengths that fill the compiled calls."""
    model, config = tiny("llama")
    plain = complete(Engine(fake_session(bundle, compiled, 1), PlainTokenizer()), [5, 7], OPTIONS)
    worker = fake_session(bundle, compiled, 1)
    assert worker.query_sizes == (1, 4, 16)
    for drafter, length in (
        (ModelDrafter(MlxSession(model, config)), FixedLength(3)),
        (NgramDrafter(), AdaptiveLength.for_queries(worker.query_sizes)),
    ):
        engine = Engine(fake_session(bundle, compiled, 1), PlainTokenizer(), drafter=drafter, length=length)
        assert complete(engine, [5, 7], OPTIONS).tokens == plain.tokens
    drafter = ModelDrafter(fake_session(bundle, compiled, 1))
    engine = Engine(MlxSession(model, config), PlainTokenizer(), drafter=drafter, length=FixedLength(3))
    assert complete(engine, [5, 7], OPTIONS).tokens == plain.tokens
    assert engine.statistics.acceptance_rate > 0.9


def test_slots_take_requests_as_they_come_free(bundle: Path, compiled: Path) -> None:
    requests = [
        Request((5, 6 + i), GenerateOptions(3 + 4 * (i % 3), stop_tokens=frozenset()), str(i)) for i in range(5)
    ]
    together = collect(Engine(fake_session(bundle, compiled, 2), PlainTokenizer()).run(requests))
    for request in requests:
        alone = complete(Engine(fake_session(bundle, compiled, 1), PlainTokenizer()), request.prompt, request.options)
        assert together[request.name].tokens == alone.tokens


def test_prompts_are_cached_through_the_states(bundle: Path, compiled: Path) -> None:
    cache = PromptCache(1_000_000)
    prompt = [5, *range(10, 40)]
    plain = complete(Engine(fake_session(bundle, compiled, 1), PlainTokenizer()), prompt, OPTIONS)
    for tail in ([], [44]):
        engine = Engine(fake_session(bundle, compiled, 1), PlainTokenizer(), cache=cache.for_model("m"))
        first = complete(engine, prompt[:-1] + tail, OPTIONS)
    engine = Engine(fake_session(bundle, compiled, 1), PlainTokenizer(), cache=cache.for_model("m"))
    assert complete(engine, prompt, OPTIONS).tokens == plain.tokens != first.tokens
    assert engine.statistics.cached_tokens == 30


def test_float16_inputs_reuse_their_buffers(bundle: Path, tmp_path: Path) -> None:
    seen: dict[str, set[int]] = {}

    class Watching(FakeCompiled):
        def predict(self, data: dict[str, np.ndarray], state: Any | None = None) -> Mapping[str, np.ndarray]:
            for name, value in data.items():
                if value.dtype == np.float32:
                    seen.setdefault(name, set()).add(id(value))
            return super().predict(data, state)

    manifest = read_manifest(bundle)
    models = CompiledModels(tmp_path, compiler=copy_package)
    packages = [CoreMLPackage(bundle / p.file, "cpu_and_ne", models, Watching) for p in manifest.packages]
    session = BundleSession(bundle, manifest, packages, 1)
    for token in range(5, 15):
        session.extend(np.array([[token]]))
    assert seen and all(len(buffers) == 1 for buffers in seen.values())


def test_models_compile_once_per_content(bundle: Path, tmp_path: Path) -> None:
    seen: list[Path] = []

    def compiler(package: Path, target: Path) -> None:
        seen.append(package)
        copy_package(package, target)

    package = bundle / read_manifest(bundle).packages[0].file
    models = CompiledModels(tmp_path / "cache", compiler=compiler)
    first = models.open(package)
    moved = tmp_path / "elsewhere.mlpackage"
    shutil.copytree(package, moved)
    assert models.open(moved) == first and len(seen) == 1
    weights = next(path for path in moved.rglob("*.bin"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert models.open(moved) != first and len(seen) == 2
    with pytest.raises(UserError, match="no such package"):
        models.open(tmp_path / "none")


def test_a_failed_compilation_leaves_nothing_and_old_models_go(bundle: Path, tmp_path: Path) -> None:
    def failing(package: Path, target: Path) -> None:
        copy_package(package, target)
        raise UserError("Core ML cannot compile this package: no", where=str(package))

    package = bundle / read_manifest(bundle).packages[0].file
    root = tmp_path / "cache"
    with pytest.raises(UserError, match="cannot compile"):
        CompiledModels(root, compiler=failing).open(package)
    assert list(root.iterdir()) == []
    old = CompiledModels(root, compiler=copy_package).open(package).parent
    os.utime(old, (1, 1))
    other = tmp_path / "other.mlpackage"
    shutil.copytree(package, other)
    (other / "note.txt").write_text("x")
    new = CompiledModels(root, budget=1, compiler=copy_package).open(other).parent
    assert list(root.iterdir()) == [new]


@pytest.mark.skipif("sys.platform == 'darwin'")
def test_elsewhere_core_ml_is_refused(bundle: Path) -> None:
    with pytest.raises(UserError, match="Core ML runs on macOS only"):
        open_package(bundle / read_manifest(bundle).packages[0].file)
    with pytest.raises(UserError, match="unknown compute units 'gpu'"):
        CoreMLPackage(bundle, "gpu", CompiledModels(bundle))  # type: ignore[arg-type]


@pytest.mark.macos
class TestRealCoreML(SessionContract):
    tolerance = 5e-2

    @pytest.fixture
    def factory(self, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Factory:
        root = tmp_path_factory.getbasetemp() / "compiled-by-core-ml"
        return lambda batch_size=1, max_context=None: open_session(
            bundle, "coreml", batch_size, units="cpu_only", root=root
        )


@pytest.mark.macos
def test_core_ml_compiles_and_loads(bundle: Path, tmp_path: Path) -> None:
    package = bundle / read_manifest(bundle).packages[0].file
    compiled = CompiledModels(tmp_path, compiler=compile_package).open(package)
    entry = read_manifest(bundle).functions[0]
    assert load_function(compiled, entry.name, "cpu_only").make_state() is not None
