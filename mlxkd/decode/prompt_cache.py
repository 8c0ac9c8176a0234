"""A prompt cache: a radix tree over token ids that shares prefixes, under one budget of bytes.

Every node holds the state of its own edge only, so that two prompts with a common beginning store it
once, and a lookup may end in the middle of an edge. States that cannot be cut (recurrent layers) are kept
whole at the ends of what was inserted. Eviction takes the least recently used leaf first, where a hit
counts as use of the whole path (mlx-lm's cache evicts in order of insertion).
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlxkd.decode.session import Array, Snapshot
from mlxkd.errors import UserError

GHOSTS = 4096
"""Evicted beginnings remembered, to tell an eviction from a prompt never seen."""


@dataclass
class CacheStatistics:
    """What the cache did. ``misses`` counts reasons; a partial hit counts its reason too."""

    lookups: int = 0
    hits: int = 0
    asked_tokens: int = 0
    cached_tokens: int = 0
    evictions: int = 0
    refused: int = 0
    misses: Counter[str] = field(default_factory=Counter)


class Node:
    """An edge of tokens and the state that belongs to it."""

    def __init__(self, tokens: np.ndarray, parent: Node | None):
        self.tokens, self.parent = tokens, parent
        self.children: dict[int, Node] = {}
        self.state: Snapshot | None = None
        self.used = 0
        self.pins = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the state and of the tokens."""
        return int(self.tokens.nbytes) + (self.state.nbytes if self.state is not None else 0)

    def path(self) -> list[Node]:
        """Nodes from below the root down to this one."""
        found: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            found.append(node)
            node = node.parent
        return found[::-1]

    def descendants(self) -> Iterator[Node]:
        """All nodes below this one."""
        for child in self.children.values():
            yield child
            yield from child.descendants()


class PromptCache:
    """States of prompts of any number of models, each in a tree of its own, under one budget.

    Args:
        budget: bytes kept at most; pinned prefixes count and are never evicted.

    Raises:
        UserError: no budget.
    """

    def __init__(self, budget: int):
        if budget <= 0:
            raise UserError(f"a prompt cache of {budget} bytes holds nothing")
        self.budget = budget
        self.statistics = CacheStatistics()
        self.last_reason: str | None = None
        self._roots: dict[str, Node] = {}
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()
        self._clock = 0

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(node.nbytes for root in self._roots.values() for node in root.descendants())

    def for_model(self, key: str) -> ModelCache:
        """The part that belongs to one model; see ``prompt_store.model_key``."""
        return ModelCache(self, key)

    def root(self, key: str) -> Node:
        """The root of a model's tree."""
        if key not in self._roots:
            self._roots[key] = Node(np.zeros(0, dtype=np.int32), None)
        return self._roots[key]

    def lookup(self, key: str, tokens: Sequence[int]) -> Snapshot | None:
        """State of the longest stored prefix, or None; ``last_reason`` says what kept it from all tokens."""
        asked = np.asarray(tokens, dtype=np.int32)
        node, matched, inside = self._walk(self.root(key), asked)
        found = self._state_at(node, matched, inside)
        length = found.length if found is not None else 0
        self.last_reason = None if length == len(asked) else self._reason(key, asked, matched, length)
        self._count(len(asked), length)
        return found

    def insert(self, key: str, tokens: Sequence[int], snapshot: Snapshot) -> bool:
        """Keep a state; returns whether it fits. What is stored already is shared, not copied.

        Raises:
            ValueError: the snapshot has another length than the tokens.
        """
        given = np.asarray(tokens, dtype=np.int32)
        if snapshot.length != len(given) or snapshot.start != 0:
            raise ValueError(f"a state of {snapshot.length} tokens was given for {len(given)}")
        if len(given) == 0:
            return True
        node, matched, inside = self._walk(self.root(key), given)
        present = matched == len(given) and inside == len(node.tokens) and node.state is not None
        share = (len(given) - matched) / len(given) if snapshot.can_cut else float(not present)
        needed = given[matched:].nbytes + int(snapshot.nbytes * share)
        self._touch(node)
        if not self._make_room(needed, keep=node):
            self.statistics.refused += 1
            return False
        node = self._split(node, inside)
        if matched < len(given):
            child = Node(given[matched:].copy(), node)
            node.children[int(given[matched])] = child
            node = child
        if snapshot.can_cut and matched < len(given):
            node.state = detached(snapshot.cut(matched, len(given)))
        elif not snapshot.can_cut:
            node.state = detached(snapshot)
        self._touch(node)
        return True

    def pin(self, key: str, tokens: Sequence[int]) -> None:
        """Keep a stored prefix whatever happens; call ``unpin`` as often.

        Raises:
            UserError: not all of these tokens are stored.
        """
        node = self._whole(key, tokens)
        for part in node.path():
            part.pins += 1

    def unpin(self, key: str, tokens: Sequence[int]) -> None:
        """Undo one ``pin``.

        Raises:
            UserError: these tokens are not pinned.
        """
        node = self._whole(key, tokens)
        if any(part.pins == 0 for part in node.path()):
            raise UserError(f"a prefix of {len(tokens)} tokens is not pinned")
        for part in node.path():
            part.pins -= 1
        self._make_room(0, keep=None)

    def _whole(self, key: str, tokens: Sequence[int]) -> Node:
        given = np.asarray(tokens, dtype=np.int32)
        node, matched, inside = self._walk(self.root(key), given)
        if matched < len(given):
            raise UserError(f"only {matched} of {len(given)} tokens are in the prompt cache", hint="insert them first")
        return self._split(node, inside)

    def _walk(self, root: Node, tokens: np.ndarray) -> tuple[Node, int, int]:
        """Deepest node reached, tokens matched in all, tokens matched inside that node's edge."""
        node, matched, inside = root, 0, 0
        while matched < len(tokens) and inside == len(node.tokens):
            child = node.children.get(int(tokens[matched]))
            if child is None:
                break
            inside = _common(child.tokens, tokens[matched:])
            node, matched = child, matched + inside
        return node, matched, inside

    def _state_at(self, node: Node, matched: int, inside: int) -> Snapshot | None:
        path = node.path()
        if not path:
            return None
        if path[0].state is not None and path[0].state.can_cut:
            parts = [part.state for part in path if part.state is not None]
            parts[-1] = parts[-1].cut(parts[-1].start, matched)
            self._touch(node)
            return joined(parts)
        if inside < len(node.tokens):
            path = path[:-1]
        for part in reversed(path):
            if part.state is not None:
                self._touch(part)
                return part.state
        return None

    def _touch(self, node: Node) -> None:
        self._clock += 1
        for part in node.path():
            part.used = self._clock

    def _split(self, node: Node, inside: int) -> Node:
        """The node that ends after ``inside`` tokens of this edge."""
        if node.parent is None or inside == len(node.tokens):
            return node
        head = Node(node.tokens[:inside].copy(), node.parent)
        head.used, head.pins = node.used, node.pins
        node.parent.children[int(head.tokens[0])] = head
        node.tokens, node.parent = node.tokens[inside:].copy(), head
        head.children[int(node.tokens[0])] = node
        if node.state is not None and node.state.can_cut:
            state = node.state
            head.state = detached(state.cut(state.start, state.start + inside))
            node.state = detached(state.cut(state.start + inside, state.length))
        return head

    def _make_room(self, needed: int, keep: Node | None) -> bool:
        kept = set(keep.path()) if keep is not None else set()
        while self.nbytes + needed > self.budget:
            leaves = [
                node
                for root in self._roots.values()
                for node in root.descendants()
                if not node.children and not node.pins and node not in kept
            ]
            if not leaves:
                return False
            self._evict(min(leaves, key=lambda node: node.used))
        return True

    def _evict(self, leaf: Node) -> None:
        path, parent = leaf.path(), leaf.parent
        assert parent is not None
        before = np.concatenate([part.tokens for part in path[:-1]]) if len(path) > 1 else np.zeros(0, dtype=np.int32)
        self._ghosts[_ghost(np.append(before, leaf.tokens[0]))] = None
        if len(self._ghosts) > GHOSTS:
            self._ghosts.popitem(last=False)
        del parent.children[int(leaf.tokens[0])]
        self.statistics.evictions += 1

    def _reason(self, key: str, asked: np.ndarray, matched: int, length: int) -> str:
        if matched < len(asked) and _ghost(asked[: matched + 1]) in self._ghosts:
            return "evicted"
        if matched > length:
            return "no state kept at this token"
        if length == 0 and any(
            self._walk(root, asked)[1] for other, root in self._roots.items() if other != key and root.children
        ):
            return "stored for another model"
        if not self.root(key).children:
            return "nothing stored for this model"
        return "not seen before" if length == 0 else "differs from here on"

    def _count(self, asked: int, cached: int) -> None:
        numbers = self.statistics
        numbers.lookups += 1
        numbers.hits += cached > 0
        numbers.asked_tokens += asked
        numbers.cached_tokens += cached
        if self.last_reason is not None:
            numbers.misses[self.last_reason] += 1


@dataclass(frozen=True)
class ModelCache:
    """A prompt cache as one engine sees it."""

    cache: PromptCache
    key: str

    def lookup(self, tokens: Sequence[int]) -> Snapshot | None:
        """See ``PromptCache.lookup``."""
        return self.cache.lookup(self.key, tokens)

    def insert(self, tokens: Sequence[int], snapshot: Snapshot) -> None:
        """See ``PromptCache.insert``."""
        self.cache.insert(self.key, tokens, snapshot)

    def pin(self, tokens: Sequence[int]) -> None:
        """See ``PromptCache.pin``."""
        self.cache.pin(self.key, tokens)


def joined(parts: Sequence[Snapshot]) -> Snapshot:
    """One snapshot from consecutive parts that start at token 0."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    arrays = {name: _concatenated([part.arrays[name] for part in parts], first, name) for name in first.arrays}
    return Snapshot(parts[-1].length, arrays, first.token_axis, first.layout, first.start)


def detached(snapshot: Snapshot) -> Snapshot:
    """The same state in memory of its own, so that dropping the original frees it."""
    arrays = {name: _copied(array) for name, array in snapshot.arrays.items()}
    mx.eval([array for array in arrays.values() if isinstance(array, mx.array)])
    return Snapshot(snapshot.length, arrays, snapshot.token_axis, snapshot.layout, snapshot.start)


def _copied(array: Array) -> Array:
    return mx.contiguous(array) if isinstance(array, mx.array) else np.array(array)


def _concatenated(arrays: list[Array], snapshot: Snapshot, name: str) -> Array:
    axis = snapshot.token_axis[name]
    assert axis is not None
    if isinstance(arrays[0], mx.array):
        return mx.concatenate([mx.array(array) for array in arrays], axis=axis)
    return np.concatenate([np.asarray(array) for array in arrays], axis=axis)


def _common(left: np.ndarray, right: np.ndarray) -> int:
    """Length of the common prefix."""
    length = min(len(left), len(right))
    differs = np.flatnonzero(left[:length] != right[:length])
    return int(differs[0]) if differs.size else length


def _ghost(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(tokens, dtype=np.int32).tobytes(), digest_size=16).digest()
