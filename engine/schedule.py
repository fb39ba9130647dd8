"""The learning rate, and the decay of the weights' moving average, as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

SCHEDULES = ("steps", "cosine")

COSINE_END = 0.01
"""Share of the learning rate that a cosine ends with."""


def lr_at(
    step: int,
    *,
    steps_per_epoch: int,
    epochs: int,
    base_lr: float,
    schedule: str,
    gamma: float,
    milestones: Sequence[float],
    warm_epochs: int,
    start_lr: float,
) -> float:
    """Learning rate of iteration ``step`` (0-based, counted over the whole run).

    Linear from ``start_lr`` to ``base_lr`` over the first ``warm_epochs`` epochs. Then "steps", the
    published schedule: ``base_lr``, times ``gamma`` from each milestone (a share of ``epochs``,
    rounded to a whole epoch) on. Or "cosine": half a period from ``base_lr`` to a hundredth of it
    at the end of the last epoch (SGDR, arXiv 1608.03983, without restarts).
    """
    warm_steps = warm_epochs * steps_per_epoch
    if step < warm_steps:
        return start_lr + (base_lr - start_lr) * step / warm_steps
    if schedule == "cosine":
        done = (step - warm_steps) / (epochs * steps_per_epoch - warm_steps)
        return base_lr * (COSINE_END + (1 - COSINE_END) * (1 + math.cos(math.pi * done)) / 2)
    epoch = step // steps_per_epoch
    return base_lr * gamma ** sum(epoch >= round(m * epochs) for m in milestones)


def ema_decay_at(updates: int, decay: float) -> float:
    """How much of the average an update keeps, after ``updates`` of them: ``decay`` in the end.

    (1 + n) / (10 + n) before: the average then spans the last tenth of the run so far, instead of
    remembering the random weights that it began with.
    """
    return min(decay, (1 + updates) / (10 + updates))
