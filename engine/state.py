"""Progress of a run: what a checkpoint holds beside tensors and random number generators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType

from utils.checkpoint import odd_part
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
            step, history, best = saved["step"], saved["history"], saved["best"]
            totals = {f.name: saved["totals"].get(f.name, f.default) for f in fields(Totals)}
            steps = [record["step"] for record in history] + ([best["step"]] if best else [])
            for value in [step, *steps, totals["steps"], totals["images"]]:
                _check_number(value, int)
            for value in totals.values():
                _check_number(value, int | float)
            if best and not (isinstance(best["value"], float) and isinstance(best["metric"], str)):
                raise TypeError(f"best is {best!r:.80}")
            if odd := odd_part([history, best, saved["data"]]):
                raise TypeError(odd)
            if not (isinstance(saved["data"], Mapping) and isinstance(history, list)):
                raise TypeError("data or history of another kind")
            return cls(step, Totals(**totals), [*map(dict, history)], dict(best))
        except Exception as error:  # whatever a foreign value does
            raise UserError(f"{path} cannot be resumed from: {error!r:.200} in its state; give "
                            "another checkpoint, or start a new run from its weights with "
                            "--resume_net") from error


def _check_number(value: object, kind: type | UnionType) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r:.60}")
