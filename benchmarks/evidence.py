"""Whether two series of times differ: a ratio with its interval, or no evidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.99


@dataclass(frozen=True)
class Ratio:
    """How many times as long something takes: the estimate and its interval."""

    estimate: float
    low: float
    high: float


def ratio(before: Sequence[float], after: Sequence[float], confidence: float = CONFIDENCE) -> Ratio:
    """Ratio of ``after``'s times to ``before``'s: the median of all pairs' ratios.

    The interval is that of the Mann-Whitney test (Hodges & Lehmann 1963), which takes times to be
    independent and nothing else of them; (0, infinity) where there are too few.

    Raises:
        ValueError: a series is empty, or a time is not positive.
    """
    if not (len(before) and len(after)) or min(*before, *after) <= 0:
        raise ValueError("both series need times, all of them positive")
    pairs = np.sort(np.subtract.outer(np.log(after), np.log(before)).ravel())
    n, m = len(before), len(after)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    outside = int(n * m / 2 - z * math.sqrt(n * m * (n + m + 1) / 12))
    low, high = (pairs[outside - 1], pairs[-outside]) if outside > 0 else (-math.inf, math.inf)
    return Ratio(*(math.exp(x) for x in (np.median(pairs), low, high)))


def drift(times: Sequence[float]) -> float:
    """How far a series runs away by itself: |log| of its second half's ratio to its first."""
    half = len(times) // 2
    return abs(math.log(ratio(times[:half], times[half:]).estimate)) if half else math.inf


def judge(before: Sequence[float], after: Sequence[float], confidence: float = CONFIDENCE) -> dict:
    """What two runs tell of a change.

    Returns:
        "ratio", "low" and "high" (None where there are too few times), and "verdict": "faster",
        "slower" or "no evidence", which it is where the interval has 1 in it, or where a run drifts
        by itself as much as the two differ.
    """
    found = ratio(before, after, confidence)
    verdict = "faster" if found.high < 1 else "slower" if found.low > 1 else "no evidence"
    if abs(math.log(found.estimate)) <= max(drift(before), drift(after)):
        verdict = "no evidence"
    return {**as_json(found), "verdict": verdict}


def as_json(found: Ratio) -> dict[str, float | None]:
    """JSON has no infinity."""
    low, high = (found.low, found.high) if found.high < math.inf else (None, None)
    return {"ratio": found.estimate, "low": low, "high": high}


def interval(judged: dict) -> str:
    if judged["low"] is None:
        return "too few rounds"
    return f"{judged['low']:.3f} to {judged['high']:.3f}"


def describe(judged: dict) -> str:
    """A judgement in words."""
    if judged["verdict"] == "no evidence":
        return f"no evidence ({interval(judged)})"
    return f"{judged['verdict']}: {interval(judged)} of the time"


def differences(one: object, other: object, name: str = "") -> list[str]:
    """What two trees of JSON differ in, a line "name: this / that" each."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            line
            for key in dict.fromkeys([*one, *other])
            for line in differences(one.get(key), other.get(key), f"{name} {key}".strip())
        ]
    return [] if one == other else [f"{name}: {one} / {other}"]
