"""What a command opens before it decodes: worker, drafter, prompt cache, number of rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxkd import compat
from mlxkd.decode.draft_length import AdaptiveLength, FixedLength
from mlxkd.decode.drafting import FirstOf, GrammarDrafter, ModelDrafter, NgramDrafter
from mlxkd.decode.engine import Drafter, DraftLength, Engine
from mlxkd.decode.mlx_session import MlxSession
from mlxkd.decode.policy import BatchChoice, PolicyCache, choose, offline_choice
from mlxkd.decode.prompt_cache import ModelCache, PromptCache
from mlxkd.decode.prompt_store import StaleCache, load, model_key, save
from mlxkd.decode.requests import Request
from mlxkd.decode.session import Session
from mlxkd.errors import UserError

SIZES = (1, 2, 4)
PROBES = 8
PROBE_TOKENS = 32


@dataclass(frozen=True)
class Worker:
    """A model or bundle whose sessions can be opened with any allowed number of rows."""

    folder: Path
    tokenizer: Any
    model: Any = None
    config: Any = None
    backend: str = "auto"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of rows that ``offline`` chooses from: 1, 2 and 4, of a bundle those it was exported with."""
        if self.model is not None:
            return SIZES
        from ane.convert.bundle import read_manifest

        return read_manifest(self.folder).batches

    def session(self, rows: int) -> Session:
        """A fresh session; models share their weights among sessions.

        Raises:
            UserError: a bundle without this number of rows, or a backend that does not run here.
        """
        if self.model is not None:
            return MlxSession(self.model, self.config, batch_size=rows)
        from ane.runtime import open_session

        session: Any = open_session(self.folder, self.backend, rows)  # type: ignore[arg-type]
        return session


def open_worker(name: str, backend: str = "auto") -> Worker:
    """A model folder, a Hugging Face repository or a converted bundle.

    Raises:
        UserError: nothing of that name, or files that cannot be read.
    """
    folder = Path(name).expanduser()
    if (folder / "manifest.json").is_file():
        return Worker(folder, compat.load_tokenizer(folder, {}), backend=backend)
    folder = compat.resolve_model(name)
    model, tokenizer, config = compat.load(folder)
    return Worker(folder, tokenizer, model, config)


def open_drafter(name: str | None, worker: Worker, rows: int, constrained: bool) -> Drafter | None:
    """Forced tokens first where there is a grammar, then n-grams or a model.

    Args:
        name: "ngram", a model or bundle of the worker's tokenizer, or None.

    Raises:
        UserError: a drafter of another tokenizer, or one that cannot rewind.
    """
    parts: list[Drafter] = [GrammarDrafter()] if constrained else []
    if name == "ngram":
        parts.append(NgramDrafter())
    elif name is not None:
        other = open_worker(name, worker.backend)
        if _vocabulary(other.tokenizer) != _vocabulary(worker.tokenizer):
            raise UserError("this drafter has another tokenizer than the worker", where=name)
        parts.append(ModelDrafter(other.session(rows)))
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else FirstOf(*parts)


def draft_length(given: int | None, session: Session) -> DraftLength:
    """A fixed length, or one that adapts among those that fill the session's compiled calls."""
    return FixedLength(given) if given is not None else AdaptiveLength.for_queries(session.query_sizes)


class CacheFile:
    """A prompt cache that lives in a file between commands.

    Args:
        path: the file; made when absent.
        worker, session: what the states belong to.
        budget: bytes in memory and on disk.

    ``stale`` says why an existing file was not used; it is replaced at the end.
    """

    def __init__(self, path: Path, worker: Worker, session: Session, budget: int):
        self.path, self.cache = path, PromptCache(budget)
        self.key = model_key(worker.folder, session.layout)
        self.stale: str | None = None
        if path.with_suffix(".safetensors").is_file():
            try:
                load(self.cache, self.key, path)
            except StaleCache as error:
                self.stale = str(error)

    @property
    def store(self) -> ModelCache:
        """What the engine uses."""
        return self.cache.for_model(self.key)

    def save(self) -> None:
        """Write the file."""
        save(self.cache, self.key, self.path)


def policy_file() -> Path:
    """~/.cache/mlxkd/batch-policy.json, or the file named by MLXKD_BATCH_POLICY."""
    named = os.environ.get("MLXKD_BATCH_POLICY")
    return Path(named) if named else Path.home() / ".cache" / "mlxkd" / "batch-policy.json"


def rows_for(workload: str, worker: Worker, requests: Sequence[Request]) -> BatchChoice:
    """How many rows to decode together; offline measures some of the requests once per hardware and model."""
    if workload == "interactive" or len(requests) == 1:
        return choose("interactive")
    sizes = tuple(size for size in worker.sizes if size <= len(requests))
    if sizes == (1,):
        return BatchChoice(1, "offline: batch 1, the only size this bundle was exported with that the queue fills")
    probes = [replace(r, options=replace(r.options, max_tokens=PROBE_TOKENS)) for r in requests[:PROBES]]
    kind = f"bundle {worker.backend}" if worker.model is None else worker.config.get("model_type")
    name = f"{kind} {model_key(worker.folder, '')[:12]}"
    return offline_choice(
        PolicyCache(policy_file()), name, lambda rows: Engine(worker.session(rows), worker.tokenizer), probes, sizes
    )


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    return dict(tokenizer.get_vocab())
