"""Progress of a run: what a checkpoint holds beside tensors and random number generators."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


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
    def of(cls, saved: dict) -> State:
        """Return the state of a checkpoint; KeyError, TypeError or ValueError if it has none."""
        names = {f.name for f in fields(Totals)}
        totals = Totals(**{k: v for k, v in saved["totals"].items() if k in names})
        return cls(int(saved["step"]), totals, list(saved["history"]), dict(saved["best"]))
