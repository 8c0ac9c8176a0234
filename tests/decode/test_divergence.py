"""Where two greedy texts part: against a table whose logits are known, and a model whose kernels really round."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from decode_models import tiny
from table_session import PlainTokenizer, Table, TableSession

from mlxkd.cli import main
from mlxkd.decode.divergence import Divergence, first_divergence, logits
from mlxkd.decode.engine import Engine
from mlxkd.decode.generate import complete
from mlxkd.decode.mlx_session import MlxSession
from mlxkd.decode.requests import GenerateOptions


def _plain(table: Table) -> list[int]:
    options = GenerateOptions(max_tokens=8, stop_tokens=frozenset())
    return list(complete(Engine(TableSession(table), PlainTokenizer()), [1], options).tokens)


def test_equal_texts_do_not_diverge() -> None:
    table = Table(4, seed=3)
    plain = _plain(table)
    assert first_divergence(TableSession(table), [1], plain, plain, 3) is None


def test_a_wrong_token_is_named_with_its_margin_and_is_beyond_exact_kernels() -> None:
    table = Table(4, seed=3)
    plain = _plain(table)
    values = table.logits((1, *plain[:5]))
    wrong = int(np.argsort(values)[-2])
    found = first_divergence(TableSession(table), [1], plain, [*plain[:5], wrong, 0, 0], 3)
    assert found is not None and (found.position, found.plain, found.other, found.noise) == (5, plain[5], wrong, 0.0)
    assert found.margin == pytest.approx(values[plain[5]] - values[wrong], abs=1e-12)
    assert not found.within_noise and "beyond" in str(found)


def test_twice_the_noise_is_the_bound() -> None:
    assert Divergence(0, 1, 2, 0.2, 0.1).within_noise
    assert not Divergence(0, 1, 2, 0.21, 0.1).within_noise


def test_kernels_differ_by_their_rounding() -> None:
    model, config = tiny("llama")
    text = np.random.default_rng(0).integers(0, 61, 40).tolist()
    single, blocks = (logits(MlxSession(model, config), text, width) for width in (1, 5))
    noise = float(np.abs(single - blocks).max())
    assert 0 < noise < 1e-4 * np.ptp(single)
    plain = [int(single[9].argmax())]
    other = [int(np.argsort(single[9])[-2])]
    found = first_divergence(MlxSession(model, config), text[:10], plain, other, 5)
    assert found is not None and found.margin == pytest.approx(single[9, plain[0]] - single[9, other[0]])


def test_the_command_checks_its_drafts(stories_model: Path) -> None:
    arguments = ["generate", str(stories_model), "Once", "--raw", "--max-tokens", "12", "--draft", "ngram", "--json"]
    result = CliRunner().invoke(main, [*arguments, "--check-drafts"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["text"] and "1 answer equals plain decoding" in result.stderr
    refused = CliRunner().invoke(main, [*arguments, "--check-drafts", "--temperature", "1"])
    assert refused.exit_code == 2 and "--check-drafts compares greedy texts" in refused.stderr
