"""An operation registers itself once, and is found by name and opset."""

from __future__ import annotations

import numpy as np
import pytest

from ane.mil.ops import registry
from mlxkd.errors import UserError


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.load_all()
    monkeypatch.setattr(registry, "_table", {})


@pytest.mark.usefixtures("table")
def test_the_newest_definition_not_later_than_the_opset_is_found() -> None:
    @registry.op("toy", versions=("ios15",))
    def old(ctx: registry.OpContext, *, x: np.ndarray) -> np.ndarray:
        return x

    @registry.op("toy", versions=("ios17",), variadic=("values",))
    def new(ctx: registry.OpContext, *, values: tuple[np.ndarray, ...], axis: int = 0) -> np.ndarray:
        return np.concatenate(values, axis)

    assert registry.find("toy", "ios16").call is old
    assert registry.find("toy", "ios18").call is new
    assert registry.find("ios15.toy", "ios18").call is old
    found = registry.find("toy", "ios17")
    assert (found.inputs, found.required, found.variadic) == ({"values", "axis"}, {"values"}, {"values"})


@pytest.mark.usefixtures("table")
def test_what_cannot_be_found_is_named() -> None:
    @registry.op("toy", versions=("ios17",))
    def toy(ctx: registry.OpContext) -> tuple[()]:
        return ()

    with pytest.raises(UserError, match=r"unknown operation 'tyo'\nhint: did you mean 'toy'\?"):
        registry.find("tyo", "ios18")
    with pytest.raises(UserError, match=r"'toy' does not exist in ios16\nhint: it is defined from ios17 on"):
        registry.find("toy", "ios16")
    with pytest.raises(UserError, match="unknown opset 'ios99'"):
        registry.find("toy", "ios99")


@pytest.mark.usefixtures("table")
def test_registering_twice_or_for_an_unknown_opset_is_refused() -> None:
    register = registry.op("toy", versions=("ios15",))
    register(lambda ctx: ())
    with pytest.raises(ValueError, match="toy is registered twice for ios15"):
        register(lambda ctx: ())
    with pytest.raises(ValueError, match="unknown opset 'ios12'"):
        registry.op("other", versions=("ios12",))(lambda ctx: ())


def test_every_module_of_the_package_is_read() -> None:
    for versions in registry.known().values():
        assert versions
