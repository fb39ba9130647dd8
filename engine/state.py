"""Progress of a run: what a checkpoint holds beside tensors and random number generators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from utils.checkpoint import is_number, odd_part
from utils.errors import UserError


@dataclass
class Totals:
    """Sums over the steps of the present epoch."""

    loss_loc: float = 0.0
    loss_conf: float = 0.0
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds of waiting for data."""


@dataclass
class State:
    """Progress of a run."""

    step: int = 0
    """Whole steps made so far."""
    totals: Totals = field(default_factory=Totals)
    history: list[dict] = field(default_factory=list)
    """The record of every epoch."""
    best: dict = field(default_factory=dict)
    """step, value and metric of the best evaluation."""

    @classmethod
    def of(cls, saved: Mapping, path: Path) -> State:
        """Return the state of the checkpoint ``saved``, read from ``path``.

        Raises:
            UserError: it has none, or a value that no run writes.
        """
        try:
            step, best = saved["step"], dict(saved["best"])
            history = [dict(record) for record in saved["history"]]
            totals = {f.name: saved["totals"].get(f.name, f.default) for f in fields(Totals)}
            marks = [best] if best else []
            whole = [step, totals["steps"], totals["images"],
                     *(record["step"] for record in [*history, *marks])]
            numbers = [*whole, *totals.values(), *(mark["value"] for mark in marks)]
            wrong = [value for value in whole if isinstance(value, float)]
            if wrong := wrong + [value for value in numbers if not is_number(value)]:
                raise ValueError(f"{wrong[0]!r:.60}")
            if odd := odd_part([history, best, dict(saved["data"])], 5_000_000):
                raise TypeError(odd)
            return cls(step, Totals(**totals), history, best)
        except Exception as error:  # whatever a foreign value does
            raise UserError(f"{path} cannot be resumed from: {error!r:.200} in its state; give "
                            "another, or start from its weights with --resume_net") from error
