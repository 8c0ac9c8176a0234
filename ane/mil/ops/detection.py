"""What detectors and classifiers end in: non-maximum suppression and class labels."""

from __future__ import annotations

from typing import Any

import numpy as np

from ane.mil.ops.registry import OpContext, op

Array = np.ndarray


def _overlaps(box: Array, boxes: Array) -> Array:
    """Intersection over union of one (x, y, width, height) box with many; 0 where both are empty."""
    size = np.minimum(box[:2] + box[2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2)
    size = np.maximum(size - np.maximum(box[:2] - box[2:] / 2, boxes[:, :2] - boxes[:, 2:] / 2), 0)
    shared = size.prod(axis=1)
    union = box[2:].prod() + boxes[:, 2:].prod(axis=1) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _survivors(boxes: Array, scores: Array, iou: float, floor: float, per_class: bool) -> list[int]:
    """Indices of the boxes kept, best first; the best box alone when none reaches the floor."""
    best, classes = scores.max(axis=1), scores.argmax(axis=1)
    kept: list[int] = []
    alive = best > floor
    for index in np.argsort(-best, kind="stable"):
        if not alive[index]:
            continue
        kept.append(int(index))
        rivals = _overlaps(boxes[index], boxes) > iou
        alive &= ~(rivals & (classes == classes[index]) if per_class else rivals)
        alive[index] = False
    return kept or [int(best.argmax())]


def _suppress(
    ctx: OpContext, boxes: Array, scores: Array, iou: Any, floor: float, max_boxes: Any, per_class: bool
) -> tuple[Array, Array, Array, Array]:
    """boxes[n, B, 4], scores[n, B, K] -> the survivors, their scores and indices, padded by 0 and -1; counts."""
    count, limit = len(boxes), int(max_boxes)
    ctx.reserve(count * limit * (4 + scores.shape[2]))
    chosen_boxes = np.zeros((count, limit, 4), boxes.dtype)
    chosen_scores = np.zeros((count, limit, scores.shape[2]), scores.dtype)
    indices = np.full((count, limit), -1, np.int32)
    numbers = np.zeros(count, np.int32)
    for n in range(count):
        kept = _survivors(boxes[n].astype(np.float64), scores[n], float(iou), floor, per_class)[:limit]
        numbers[n] = len(kept)
        chosen_boxes[n, : len(kept)], chosen_scores[n, : len(kept)] = boxes[n, kept], scores[n, kept]
        indices[n, : len(kept)] = kept
    return chosen_boxes, chosen_scores, indices, numbers


@op("non_maximum_suppression", versions=("ios15",))
def non_maximum_suppression(
    ctx: OpContext,
    *,
    boxes: Array,
    scores: Array,
    iou_threshold: Any,
    score_threshold: Any,
    max_boxes: Any,
    per_class_suppression: bool = False,
) -> tuple[Array, Array, Array, Array]:
    """Greedy suppression by the best class score; boxes are (x, y, width, height) around their centres."""
    floor, per_class = float(score_threshold), bool(per_class_suppression)
    return _suppress(ctx, boxes, scores, iou_threshold, floor, max_boxes, per_class)


@op("non_maximum_suppression", versions=("ios17",))
def non_maximum_suppression_17(
    ctx: OpContext,
    *,
    boxes: Array,
    scores: Array,
    iou_threshold: Any,
    max_boxes: Any,
    per_class_suppression: bool = False,
) -> tuple[Array, Array, Array]:
    """The same with boxes in the last axis, no score threshold and no count."""
    rows, marks = np.swapaxes(boxes, 1, 2), np.swapaxes(scores, 1, 2)
    kept = _suppress(ctx, rows, marks, iou_threshold, -np.inf, max_boxes, bool(per_class_suppression))
    return np.swapaxes(kept[0], 1, 2), np.swapaxes(kept[1], 1, 2), kept[2]


@op("classify", versions=("ios15",))
def classify(ctx: OpContext, *, probabilities: Array, classes: Any) -> tuple[Any, dict[Any, float]]:
    """The most probable label, and the probability of each."""
    labels = [c.item() if isinstance(c, np.generic) else c for c in classes]
    values = np.ravel(probabilities)
    return labels[int(values.argmax())], {k: float(v) for k, v in zip(labels, values, strict=True)}
