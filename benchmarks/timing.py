"""Times of several calls that take turns, so that a disturbance meets all; and their file."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from utils.files import write_json

CPU = torch.device("cpu")


def medians(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 2
) -> dict[str, float]:
    """Median wall seconds of each call, from an idle device to an idle device.

    The first ``warm_up`` rounds, in which caches fill and algorithms are chosen, do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + warm_up):
        for name, call in calls.items():
            taken = _seconds(call, device)
            if turn >= warm_up:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def machine(device: torch.device) -> str:
    """What the times are of, in words."""
    name = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, PyTorch {torch.__version__}"


def write(path: Path | None, device: torch.device, **content) -> None:
    """Keep ``content`` as JSON beside what it is of, or print it in one line where ``path`` is
    "-"; nothing without a path."""
    content = {"machine": machine(device), **content}
    if path == Path("-"):
        print(json.dumps(content))
    elif path:
        write_json(path, content)
