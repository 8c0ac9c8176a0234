"""A store of sparse targets on disk: found by what the tokens are, never by where they stood in a batch.

A folder holds ``manifest.json`` and shards. A shard is written whole or not at all; it starts with eight bytes of
header length (little endian) and a JSON header, then one fixed-size record per supervised position:

    ids       K x uint16 (uint24 where the vocabulary needs it), most likely first
    logprobs  K x float16, natural logarithms at temperature 1
    tails     T x float16, log of the mass beyond the ids at each temperature of the manifest

The log-sum-exp of a temperature follows from its tail, and the tail keeps its digits where 1 - sum would not.
Each text has a CRC-32 over its records and a bit mask of its supervised positions.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxkd.errors import UserError
from mlxkd.files import atomic_file, write_json

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What every record of a store has in common.

    Args:
        teacher: identity hash of the teacher.
        tokenizer: hash of its vocabulary.
        vocabulary: number of token ids its head speaks about.
        k: ids per position.
        temperatures: those that can be trained at.
        form: "bucket" (top ids and a tail) or "sampled" (draws with weights; one temperature).
    """

    teacher: str
    tokenizer: str
    vocabulary: int
    k: int
    temperatures: tuple[float, ...]
    form: str = "bucket"

    @property
    def id_bytes(self) -> int:
        """2 or 3."""
        return 2 if self.vocabulary <= 2**16 else 3

    @property
    def record_bytes(self) -> int:
        """Bytes per supervised position."""
        return self.k * (self.id_bytes + 2) + 2 * len(self.temperatures)


@dataclass(frozen=True)
class Records:
    """What the teacher said at n positions: ids int32 [n, K], logprobs and tails float16 [n, K] and [n, T]."""

    ids: np.ndarray
    logprobs: np.ndarray
    tails: np.ndarray


def largest_k(vocabulary: int, temperatures: int, budget: int = 98) -> int:
    """Ids per position that fit ``budget`` bytes, headers aside."""
    return max(1, min(vocabulary - 1, (budget - 2 * temperatures) // ((2 if vocabulary <= 2**16 else 3) + 2)))


def key_of(tokens: np.ndarray) -> str:
    """The name of a text: a hash of its token ids."""
    return hashlib.blake2b(np.ascontiguousarray(tokens, dtype=np.int32).tobytes(), digest_size=16).hexdigest()


def pack(records: Records, manifest: Manifest) -> bytes:
    """Records as the bytes of a shard."""
    raw = np.ascontiguousarray(records.ids.astype("<u4")).view(np.uint8).reshape(*records.ids.shape, 4)
    parts = (raw[..., : manifest.id_bytes], records.logprobs.astype("<f2"), records.tails.astype("<f2"))
    n = len(records.ids)
    return np.concatenate([np.ascontiguousarray(p).view(np.uint8).reshape(n, -1) for p in parts], axis=1).tobytes()


def unpack(data: np.ndarray, manifest: Manifest) -> Records:
    """Bytes (uint8 [n, record_bytes]) as records."""
    ids_end = manifest.k * manifest.id_bytes
    logs_end = ids_end + 2 * manifest.k
    ids = np.zeros((len(data), manifest.k, 4), dtype=np.uint8)
    ids[..., : manifest.id_bytes] = data[:, :ids_end].reshape(len(data), manifest.k, manifest.id_bytes)
    return Records(
        ids.view("<u4")[..., 0].astype(np.int32),
        np.ascontiguousarray(data[:, ids_end:logs_end]).view("<f2"),
        np.ascontiguousarray(data[:, logs_end:]).view("<f2"),
    )


class Store:
    """An open store. Any number of processes may read it, also while one appends.

    Args:
        folder: the store.

    Raises:
        UserError: no store there, one of another format, or a damaged shard.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = _read_manifest(folder)
        self._at: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for path in sorted(folder.glob("*.shard")):
            for entry, start in _entries(path, self.manifest):
                self._at[entry["key"]] = (path, start, entry)
        self._maps: dict[Path, np.memmap[Any, Any]] = {}

    @staticmethod
    def create(folder: Path, manifest: Manifest) -> Store:
        """Open the store for appending, making it first where there is none.

        Raises:
            UserError: the folder holds a store of something else.
        """
        if (folder / MANIFEST).is_file():
            found = _read_manifest(folder)
            for name, value in asdict(manifest).items():
                if (old := getattr(found, name)) != value:
                    raise UserError(
                        f"this cache was made with {name} {_short(old)}, now it is {_short(value)}",
                        where=str(folder),
                        hint="choose another --out folder, or delete this one",
                    )
        else:
            write_json(folder / MANIFEST, {"format": FORMAT, **asdict(manifest)})
        return Store(folder)

    def __contains__(self, key: str) -> bool:
        return key in self._at

    def __len__(self) -> int:
        return len(self._at)

    @property
    def positions(self) -> int:
        """Supervised positions in the store."""
        return sum(entry["count"] for _, _, entry in self._at.values())

    @property
    def bytes(self) -> int:
        """Size of the shards on disk, headers included."""
        return sum(path.stat().st_size for path in self.folder.glob("*.shard"))

    def append(self, texts: list[tuple[str, np.ndarray, Records]]) -> None:
        """Add one shard of (key, supervised mask bool [n - 1], records); keys already present are left out."""
        new = [text for text in texts if text[0] not in self]
        if not new:
            return
        entries, payload = [], b""
        for key, mask, records in new:
            data = pack(records, self.manifest)
            bits = np.packbits(mask).tobytes().hex()
            entries.append({"key": key, "count": len(records.ids), "mask": bits, "crc": zlib.crc32(data)})
            payload += data
        header = json.dumps(entries, separators=(",", ":")).encode()
        path = self.folder / f"{key_of(np.frombuffer(header, dtype=np.uint8))}.shard"
        with atomic_file(path) as temporary:
            temporary.write_bytes(len(header).to_bytes(8, "little") + header + payload)
        for entry, start in _entries(path, self.manifest):
            self._at[entry["key"]] = (path, start, entry)

    def read(self, key: str, positions: np.ndarray) -> Records:
        """Records of a text at ``positions`` (indices of the predicted token less one).

        Raises:
            UserError: the text is absent, a position was not supervised when it was taught, or bytes are damaged.
        """
        if key not in self._at:
            raise UserError(
                "a text is not in the teacher cache",
                where=str(self.folder),
                hint="run `mlxkd teach` with the same data, shapes and tokenizer; it adds only what is missing",
            )
        path, start, entry = self._at[key]
        size = self.manifest.record_bytes
        if path not in self._maps:
            self._maps[path] = np.memmap(path, dtype=np.uint8, mode="r")
        data = self._maps[path][start : start + entry["count"] * size]
        if zlib.crc32(data.tobytes()) != entry["crc"]:
            raise UserError("the checksum does not match: the cache is damaged", where=str(path), hint=_DELETE)
        mask = np.unpackbits(np.frombuffer(bytes.fromhex(entry["mask"]), dtype=np.uint8)).astype(bool)
        if positions.max(initial=-1) >= len(mask) or not mask[positions].all():
            raise UserError(
                "the cache was made with other loss masks: a supervised position is missing",
                where=str(path),
                hint=_AGAIN,
            )
        rows = (np.cumsum(mask) - 1)[positions]
        return unpack(data.reshape(-1, size)[rows], self.manifest)


_AGAIN = "run `mlxkd teach` again into an empty folder"
_DELETE = "delete this file and run `mlxkd teach` again; it adds only what is missing"


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError("no teacher cache here: manifest.json is missing", where=str(folder), hint="run `mlxkd teach`")
    try:
        values = json.loads(path.read_text())
        if values.pop("format") != FORMAT:
            raise UserError(f"this cache has another format than {FORMAT}", where=str(path), hint=_AGAIN)
        return Manifest(**values | {"temperatures": tuple(values["temperatures"])})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"the cache's manifest cannot be read: {error}", where=str(path), hint=_AGAIN) from error


def _entries(path: Path, manifest: Manifest) -> Iterator[tuple[dict[str, Any], int]]:
    """(entry, offset of its first byte) of a shard."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        size = path.stat().st_size
        try:
            entries = json.loads(stream.read(length)) if length < size else None
        except (json.JSONDecodeError, UnicodeDecodeError):
            entries = None
    total = sum(entry["count"] for entry in entries) if entries else 0
    if entries is None or 8 + length + total * manifest.record_bytes != size:
        raise UserError("the shard is cut short or damaged", where=str(path), hint=_DELETE)
    start = 8 + length
    for entry in entries:
        yield entry, start
        start += entry["count"] * manifest.record_bytes


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 12 else str(value)
