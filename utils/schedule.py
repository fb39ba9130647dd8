"""The published learning-rate schedule as a pure function of the step."""

from __future__ import annotations

from collections.abc import Sequence


def lr_at(
    step: int,
    *,
    steps_per_epoch: int,
    epochs: int,
    base_lr: float,
    gamma: float,
    milestones: Sequence[float],
    warm_epochs: int,
    start_lr: float,
) -> float:
    """Learning rate of iteration ``step`` (0-based, counted over the whole run).

    Linear from ``start_lr`` to ``base_lr`` over the first ``warm_epochs`` epochs, then
    ``base_lr``, times ``gamma`` from each milestone (a share of ``epochs``, rounded to a whole
    epoch) on.
    """
    warm_steps = warm_epochs * steps_per_epoch
    if step < warm_steps:
        return start_lr + (base_lr - start_lr) * step / warm_steps
    epoch = step // steps_per_epoch
    return base_lr * gamma ** sum(epoch >= round(m * epochs) for m in milestones)
