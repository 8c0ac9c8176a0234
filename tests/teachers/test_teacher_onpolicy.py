"""Rollouts, correction, replay, routes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from kd_toys import toy
from mlx.utils import tree_flatten

from mlxkd.data.batching import Batches
from mlxkd.data.example import Example
from mlxkd.errors import UserError
from mlxkd.losses.step import loss_and_gradients
from mlxkd.losses.term import Term
from mlxkd.recipe_sections import OnPolicy
from mlxkd.students.split import Split
from mlxkd.teachers.local import LocalTeacher
from mlxkd.teachers.onpolicy import Replay, Rollouts, complete, corrected, on_policy_step, prompts_of
from mlxkd.teachers.routed import RoutedTeachers
from mlxkd.training.feed import WrittenText

PROMPTS = [np.array(p, dtype=np.int32) for p in ([1, 2, 3], [4], [5, 6, 7, 8, 9])]


def greedy(model, prompt, count):
    tokens = prompt.tolist()
    for _ in range(count):
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1])))
    return tokens


def test_greedy_rollouts_are_plain_greedy_decoding() -> None:
    model, _ = toy(1)
    examples = complete(model, PROMPTS, Rollouts(max_tokens=5, temperature=0, rows=2), seed=0)
    for example, prompt in zip(examples, PROMPTS, strict=True):
        assert example.tokens.tolist() == greedy(model, prompt, 5)
        assert example.weights.tolist() == [0] * len(prompt) + [1] * 5
        (found,) = prompts_of(example)
        assert found.tolist() == prompt.tolist() and example.meta["on_student"]


def test_every_turn_can_be_continued_and_what_precedes_it_is_context() -> None:
    example = Example(np.arange(8, dtype=np.int32), np.float32([0, 0, 1, 1, 0, 0, 1, 0]))
    assert [p.tolist() for p in prompts_of(example)] == [[0, 1], [0, 1, 2, 3, 4, 5]]


def test_stop_ends_a_rollout_and_is_learnt() -> None:
    model, _ = toy(1)
    stop = greedy(model, PROMPTS[0], 3)[-1]
    (example,) = complete(model, PROMPTS[:1], Rollouts(5, 0, frozenset([stop])), seed=0)
    assert example.tokens[-1] == stop and example.weights[-1] == 1
    assert len(example) <= 6


def test_sampling_follows_the_seed_and_the_distribution() -> None:
    model, _ = toy(1)
    draw = Rollouts(max_tokens=1, temperature=1.5, rows=64)
    many = [PROMPTS[0]] * 400
    first = [int(e.tokens[-1]) for e in complete(model, many, draw, seed=7)]
    assert first == [int(e.tokens[-1]) for e in complete(model, many, draw, seed=7)]
    assert first != [int(e.tokens[-1]) for e in complete(model, many, draw, seed=8)]
    p = np.array(mx.softmax(model(mx.array(PROMPTS[0][None]))[0, -1] / 1.5))
    seen = np.bincount(first, minlength=37) / 400
    assert np.abs(seen - p).max() < 5 * np.sqrt(0.25 / 400)


def test_correction_stays_within_the_teachers_top() -> None:
    """With top 1 the text is the teacher's greedy text whatever the student proposes; with all ids nothing changes."""
    student, teacher = toy(1)[0], toy(2)[0]
    options = Rollouts(max_tokens=6, temperature=0)
    strict = corrected(student, teacher, PROMPTS[0], options, 0, top=1)
    assert strict.tokens.tolist() == greedy(teacher, PROMPTS[0], 6) and strict.meta["replaced"] > 0
    free = corrected(student, teacher, PROMPTS[0], options, 0, top=37)
    assert free.tokens.tolist() == greedy(student, PROMPTS[0], 6) and free.meta["replaced"] == 0


def test_training_on_rollouts_has_no_gradient_through_sampling() -> None:
    """The gradient equals that on the same tokens given as data."""
    student, teacher = toy(1)[0], LocalTeacher(toy(2)[0])
    examples = complete(student, PROMPTS, Rollouts(max_tokens=4), seed=3)
    given = [Example(e.tokens.copy(), e.weights.copy()) for e in examples]
    steps = []
    for data in (examples, given):
        batch = Batches(data, [(3, 9)]).batch(0)
        steps.append(loss_and_gradients(student, Split(student), batch, teacher.targets(batch), [Term("reverse_kl")]))
    for (_, a), (_, b) in zip(*(tree_flatten(s.gradients) for s in steps), strict=True):
        assert mx.array_equal(a, b)


def test_the_coin_and_the_buffer_resume() -> None:
    tosses = [on_policy_step(1, step, 0.3) for step in range(2000)]
    assert tosses == [on_policy_step(1, step, 0.3) for step in range(2000)] and 0.25 < np.mean(tosses) < 0.35
    assert not on_policy_step(1, 0, 0.0) and on_policy_step(1, 0, 1.0)
    replay, texts = Replay(capacity=3, staleness=10), [Example(np.int32([i, i]), np.float32([0, 1])) for i in range(5)]
    replay.add(0, texts[:2])
    replay.add(8, texts[2:])
    assert {int(e.tokens[0]) for e in replay.draw(9, 9, 0)} == {2, 3, 4}
    assert len(replay.draw(9, 2, 0)) == 2 and replay.draw(19, 9, 0) == []


def test_routes_give_each_teacher_its_own_sources() -> None:
    student, first, second = toy(1)[0], LocalTeacher(toy(2)[0]), LocalTeacher(toy(3)[0])
    data = [Example(np.int32([1, 2, 3, 4]), np.float32([0, 1, 1, 1]), source=s) for s in ("math/a", "chat/b")]
    batches = Batches(data, [(2, 3)])
    both = RoutedTeachers({"a": first, "b": second}, batches.examples, {"math": "a", "": "b"})
    batch = batches.batch(0)
    terms = [Term("forward_kl", teacher="a"), Term("forward_kl", teacher="b")]
    sums = loss_and_gradients(student, Split(student), batch, both.targets(batch), terms).sums
    for name, teacher, source in (("a", first, "math"), ("b", second, "chat")):
        one = Batches([e for e in data if e.source.startswith(source)], [(1, 3)]).batch(0)
        alone = loss_and_gradients(student, Split(student), one, teacher.targets(one), [Term("forward_kl")]).sums
        assert sums[f"forward_kl/{name}"].item() == pytest.approx(alone["loss"].item(), rel=1e-5)


def test_refusals() -> None:
    model, _ = toy(1)
    with pytest.raises(UserError, match="a prompt is empty"):
        complete(model, [np.array([], np.int32)], Rollouts(), 0)
    with pytest.raises(UserError, match=r"the on-policy share must lie between 0 and 1, not 1.5"):
        on_policy_step(0, 0, 1.5)
    with pytest.raises(UserError, match="max_tokens 0 or temperature 1"):
        Rollouts(max_tokens=0)
    with pytest.raises(UserError, match="the route 'math' leads to a teacher 'c' that is not there"):
        RoutedTeachers({"a": None}, [], {"math": "c"})
    lost = RoutedTeachers(
        {"a": LocalTeacher(model)}, [Example(np.int32([1, 2]), np.float32([0, 1]), source="x")], {"y": "a"}
    )
    with pytest.raises(UserError, match="no route for data from 'x'"):
        lost.targets(Batches(lost.examples, [(1, 1)]).batch(0))


def test_a_plain_text_is_continued_after_a_lead_that_fits() -> None:
    example = Example(np.arange(8, dtype=np.int32), np.float32([0] + [1] * 7), meta={"kind": "text"})
    assert [p.tolist() for p in prompts_of(example)] == [[0]]
    assert [p.tolist() for p in prompts_of(example, 3)] == [[0, 1, 2]]
    assert [len(p) for p in prompts_of(example, 100)] == [7]


def test_the_teacher_can_be_the_writer() -> None:
    """At temperature 0 its text is its own likeliest continuation, and is no sample of the student."""
    student, teacher = toy(1)[0], toy(2)[0]
    tokens = np.arange(1, 9, dtype=np.int32)
    data = Batches([Example(tokens, np.r_[0, np.ones(7)].astype(np.float32), meta={"kind": "text"})] * 2, [(2, 16)])
    wanted = OnPolicy(writer="teacher", share=1.0, max_tokens=5, prompt=3, temperature=0.0)
    feed = WrittenText(data, wanted, student, teacher, frozenset(), seed=0, total=4)
    batch = feed.batch(0)
    for row in batch.rows:
        text = feed.examples[row]
        assert len(text) == 8 and (text.tokens[:3] == tokens[:3]).all() and not text.meta["on_student"]
        likeliest = np.array(mx.argmax(teacher(mx.array(text.tokens[None, :-1])), axis=-1))[0]
        assert (text.tokens[3:] == likeliest[2:]).all()
        assert text.weights.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


def test_a_resumed_replay_knows_which_texts_the_student_wrote_alone() -> None:
    """SKD's corrected proposals are no samples of the student, before and after a resume."""
    student, teacher = toy(1)[0], toy(2)[0]
    tokens = np.arange(1, 9, dtype=np.int32)
    data = Batches([Example(tokens, np.r_[np.zeros(4), np.ones(4)].astype(np.float32))] * 2, [(2, 16)])
    wanted = OnPolicy(share=1.0, max_tokens=4, corrected=0.5, replay=0.0)

    def feed() -> WrittenText:
        return WrittenText(data, wanted, student, teacher, frozenset(), seed=0, total=4)

    first, resumed = feed(), feed()
    for step in range(4):
        first.batch(step)
    resumed.restore(first.state())
    written = [(step, text.meta["on_student"]) for step, text in first.replay.kept]
    assert written == [(step, step >= 2) for step in range(4) for _ in range(2)]
    assert [(step, text.meta["on_student"]) for step, text in resumed.replay.kept] == written
