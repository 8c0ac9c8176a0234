"""What every session must do. A backend joins by subclassing and giving a ``factory`` fixture.

``factory(batch_size=1, max_context=None)`` opens a session; ``max_context`` None is the backend's own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mlxkd.decode.session import CannotRewind, ContextOverflow, Session, Snapshot, SnapshotMismatch

Factory = Callable[..., Session]


def tokens_for(session: Session, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, session.vocab_size, count).astype(np.int32)


def last_rows(session: Session, tokens: np.ndarray) -> np.ndarray:
    """Logits [n, V] of one row fed at once."""
    return np.array(session.extend(tokens[None]), dtype=np.float64)[0]


class SessionContract:
    tolerance = 1e-4
    """Largest difference of a logit between two ways to the same state."""

    @pytest.fixture
    def factory(self) -> Factory:
        raise NotImplementedError

    def same(self, left: np.ndarray, right: np.ndarray) -> None:
        np.testing.assert_allclose(left, right, atol=self.tolerance, rtol=self.tolerance)

    @pytest.mark.parametrize("sizes", [(1,) * 12, (5, 7), (3, 1, 8), (11, 1)], ids=str)
    def test_any_split_equals_at_once(self, factory: Factory, sizes: tuple[int, ...]) -> None:
        whole, parts = factory(), factory()
        tokens = tokens_for(whole, 12)
        expected = last_rows(whole, tokens)
        ends = np.cumsum(sizes)
        pieces = [last_rows(parts, tokens[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
        self.same(np.concatenate(pieces), expected)
        assert parts.lengths.tolist() == whole.lengths.tolist() == [12]

    def test_logits_depend_on_what_came_before(self, factory: Factory) -> None:
        """Guards the suite itself: a session that forgets its context would pass most other tests."""
        left, right = factory(), factory()
        tokens = tokens_for(left, 9)
        other = tokens.copy()
        other[0] = (other[0] - 3 + 1) % (left.vocab_size - 3) + 3
        assert np.abs(last_rows(left, tokens)[-1] - last_rows(right, other)[-1]).max() > 10 * self.tolerance

    @pytest.mark.parametrize(("fed", "kept"), [(12, 7), (12, 11), (8, 1), (6, 6)])
    def test_rewinding_equals_never_having_gone_there(self, factory: Factory, fed: int, kept: int) -> None:
        session, straight = factory(), factory()
        if not session.can_rewind and fed != kept:
            pytest.skip("this state keeps no history")
        tokens, others = tokens_for(session, 20), tokens_for(session, 20, seed=1)
        session.extend(tokens[None, :fed])
        session.rewind([kept])
        last_rows(straight, tokens[:kept])
        self.same(last_rows(session, others[:5]), last_rows(straight, others[:5]))

    def test_rewinding_to_nothing_always_works(self, factory: Factory) -> None:
        session, straight = factory(), factory()
        tokens = tokens_for(session, 10)
        session.extend(tokens[None])
        session.rewind([0])
        assert session.lengths.tolist() == [0]
        self.same(last_rows(session, tokens[:6]), last_rows(straight, tokens[:6]))

    def test_a_state_without_history_says_so(self, factory: Factory) -> None:
        session = factory()
        if session.can_rewind:
            pytest.skip("this state can rewind")
        tokens = tokens_for(session, 6)
        session.extend(tokens[None])
        with pytest.raises(CannotRewind, match="keeps no history, so it cannot rewind"):
            session.rewind([3])
        straight = factory()
        straight.extend(tokens[None])
        self.same(last_rows(session, tokens[:2]), last_rows(straight, tokens[:2]))

    def test_a_snapshot_survives_what_follows(self, factory: Factory) -> None:
        session, straight = factory(), factory()
        tokens, detour = tokens_for(session, 14), tokens_for(session, 14, seed=2)
        session.extend(tokens[None, :8])
        kept = session.snapshot(0)
        session.extend(detour[None, :6])
        session.restore(0, kept)
        straight.extend(tokens[None, :8])
        expected = last_rows(straight, tokens[8:])
        self.same(last_rows(session, tokens[8:]), expected)
        elsewhere = factory()
        elsewhere.restore(0, kept)
        self.same(last_rows(elsewhere, tokens[8:]), expected)
        assert kept.length == 8 and kept.nbytes > 0

    def test_rows_of_different_lengths(self, factory: Factory) -> None:
        batch = factory(batch_size=3)
        tokens = tokens_for(batch, 12)
        counts = [3, 7, 5]
        block = np.stack([np.where(np.arange(7) < count, tokens[:7], 1) for count in counts])
        first = np.array(batch.extend(block, counts), dtype=np.float64)
        second = np.array(batch.extend(np.stack([tokens[c : c + 4] for c in counts])), dtype=np.float64)
        for row, count in enumerate(counts):
            expected = last_rows(factory(), tokens[: count + 4])
            self.same(first[row, :count], expected[:count])
            self.same(second[row], expected[count:])
        assert batch.lengths.tolist() == [7, 11, 9]

    def test_rows_are_rewound_and_idle_alone(self, factory: Factory) -> None:
        batch = factory(batch_size=2)
        tokens = tokens_for(batch, 16)
        batch.extend(np.stack([tokens[:6], tokens[6:12]]))
        if batch.can_rewind:
            batch.rewind([2, 6])
        else:
            batch.rewind([0, 6])
            batch.extend(np.stack([tokens[:2], tokens[:2]]), [2, 0])
        batch.extend(np.stack([tokens[2:5], tokens[:3]]), [3, 0])
        assert batch.lengths.tolist() == [5, 6]
        last = np.array(batch.extend(np.stack([tokens[5:8], tokens[12:15]])), dtype=np.float64)
        self.same(last[0], last_rows(factory(), tokens[:8])[5:])
        self.same(last[1], last_rows(factory(), tokens[6:15])[6:])

    def test_a_snapshot_moves_between_rows(self, factory: Factory) -> None:
        batch = factory(batch_size=2)
        tokens = tokens_for(batch, 16)
        batch.extend(np.stack([tokens[:9], tokens[3:12]]), [9, 4])
        batch.restore(1, batch.snapshot(0))
        logits = np.array(batch.extend(np.stack([tokens[9:12], tokens[12:15]])), dtype=np.float64)
        self.same(logits[0], last_rows(factory(), tokens[:12])[9:])
        mixed = np.concatenate([tokens[:9], tokens[12:15]])
        self.same(logits[1], last_rows(factory(), mixed)[9:])

    @pytest.mark.parametrize("kept", [1, 5, 8])
    def test_a_prefix_of_a_snapshot_is_the_state_at_that_token(self, factory: Factory, kept: int) -> None:
        session = factory()
        tokens = tokens_for(session, 12)
        session.extend(tokens[None, :8])
        snapshot = session.snapshot(0)
        if not snapshot.can_cut:
            with pytest.raises(CannotRewind, match="cannot be cut"):
                snapshot.cut(0, kept)
            return
        session.restore(0, snapshot.cut(0, kept))
        self.same(last_rows(session, tokens[kept:]), last_rows(factory(), tokens)[kept:])

    def test_overflow_is_refused_before_anything_is_lost(self, factory: Factory) -> None:
        session, straight = factory(batch_size=2), factory()
        room = session.max_context
        tokens = np.resize(tokens_for(session, 64), room)
        for at in range(0, room - 2, 64):
            part = tokens[at : min(at + 64, room - 2)]
            session.extend(np.stack([part, part]), [len(part), min(len(part), 3) if at == 0 else 0])
            straight.extend(part[None])
        before = session.lengths
        with pytest.raises(ContextOverflow, match=rf"row 0 holds {room - 2} tokens and 3 more do not fit into {room}"):
            session.extend(np.ones((2, 3), dtype=np.int32))
        assert session.lengths.tolist() == before.tolist() == [room - 2, 3]
        last = np.array(session.extend(np.stack([tokens[-2:], tokens[-2:]])), dtype=np.float64)[0]
        self.same(last, last_rows(straight, tokens[-2:]))
        assert session.lengths[0] == room

    def test_foreign_snapshots_are_refused(self, factory: Factory) -> None:
        session = factory()
        session.extend(tokens_for(session, 4)[None])
        own = session.snapshot(0)
        foreign = Snapshot(own.length, own.arrays, own.token_axis, "another:layout")
        with pytest.raises(SnapshotMismatch, match="taken from 'another:layout'"):
            session.restore(0, foreign)
        assert session.lengths.tolist() == [4]

    def test_nonsense_is_refused(self, factory: Factory) -> None:
        session = factory()
        with pytest.raises(ValueError, match="token ids must lie in"):
            session.extend(np.array([[session.vocab_size]]))
        with pytest.raises(ValueError, match="counts"):
            session.extend(np.array([[1, 2]]), [3])
        with pytest.raises(ValueError, match="cannot rewind rows"):
            session.rewind([1])
        assert session.lengths.tolist() == [0]
