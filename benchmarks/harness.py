"""What all benchmarks share: options, rows of results, calls that take turns, and evidence."""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import NormalDist

import cv2
import numpy as np
import torch

from utils.arguments import Parser, positive
from utils.device import choose_device
from utils.files import write_json

CPU = torch.device("cpu")
Rows = Iterator[dict[str, object]]
"""Results of a benchmark. A row with an "error" makes its exit status 1."""
Calls = Mapping[Hashable, Callable[[], object]]


def program(name: str, doc: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Return the parser of a benchmark, described by the first line of its module."""
    return Parser(prog=f"python -m benchmarks.{name}", description=doc.split("\n")[0],
                  parents=parents, allow_abbrev=False)


def options(rows: Callable[[argparse.Namespace, torch.device], Rows], rounds: int,
            device: bool = True) -> argparse.ArgumentParser:
    """Return the options of all benchmarks, as a parent of their parsers; `run` calls ``rows``."""
    p = argparse.ArgumentParser(add_help=False)
    p.set_defaults(rows=rows, device="cpu")
    if device:
        p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    p.add_argument("--rounds", type=positive, default=rounds, help="timed rounds (%(default)s)")
    p.add_argument("--json", type=Path, metavar="OUT", help="a file; -: the last line of output")
    return p


def run(parser: Callable[[], argparse.ArgumentParser], argv: Sequence[str] | None) -> int:
    """Run a benchmark: print its rows as they come, and keep them as JSON. Return its status."""
    args = parser().parse_args(argv)
    device = choose_device(args.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as train_test.py
    print(machine(device))
    rows = []
    for row in args.rows(args, device):
        print(line(row), flush=True)
        rows.append(row)
        if args.json != Path("-"):  # a run that is stopped leaves the rows so far
            write(args.json, device, rows=rows)
    if args.json == Path("-"):
        write(args.json, device, rows=rows)
    return int(any("error" in row for row in rows))


def line(row: Mapping[str, object]) -> str:
    """Return a row in words: names as they are, other values behind their key, seconds in ms."""
    parts = []
    for key, value in row.items():
        if key == "seconds":
            key, value = "ms", {name: 1e3 * x for name, x in value.items()}
        if isinstance(value, Mapping):
            value = f"{key} " + ", ".join(f"{name} {_text(x)}" for name, x in value.items())
        parts.append(value if isinstance(value, str) else f"{key} {_text(value)}")
    return "; ".join(parts)


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine(device: torch.device) -> str:
    name = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, PyTorch {torch.__version__}"


def write(path: Path | None, device: torch.device, **content: object) -> None:
    """Write ``content`` and the machine as JSON: to ``path``, or to standard output if it is "-".

    "load" is the mean number of busy processes in the last minute, None if the system does not
    say. More than the threads of this process means that other programs ran beside it.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    content = {"machine": machine(device), "load": load, **content}
    if path == Path("-"):
        print(json.dumps(content))
    elif path:
        write_json(path, content)


def turns(calls: Calls, rounds: int, warm_up: int = 2) -> dict[Hashable, list]:
    """Return every call's results. The calls take turns, so that a disturbance meets all of them.

    The first ``warm_up`` rounds are not kept: caches fill and algorithms are chosen in them.
    """
    results: dict[Hashable, list] = {name: [] for name in calls}
    for turn in range(-warm_up, rounds):
        for name, call in calls.items():
            result = call()
            if turn >= 0:
                results[name].append(result)
    return results


def race(calls: Calls, rounds: int, device: torch.device,
         warm_up: int = 2) -> tuple[dict[Hashable, float], dict]:
    """Return the median wall seconds of each call and its last result; see `turns`."""
    results: dict = {}
    timed = {name: partial(_timed, name, call, device, results) for name, call in calls.items()}
    times = turns(timed, rounds, warm_up)
    return {name: statistics.median(x) for name, x in times.items()}, results


def _timed(name: Hashable, call: Callable, device: torch.device, results: dict) -> float:
    start = now(device)
    results[name] = call()
    return now(device) - start


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Use ``count`` threads of PyTorch and OpenCV within the block."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    try:
        torch.set_num_threads(count)
        cv2.setNumThreads(count)
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


def now(device: torch.device) -> float:
    """Return the clock's seconds once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def in_a_process(call: Callable, *arguments: object) -> object:
    """Return the result of a call in a new process, whose memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def ratio(before: Sequence[float], after: Sequence[float],
          confidence: float = 0.99) -> tuple[float, float, float]:
    """Return the ratio of the times ``after`` to the times ``before``, and its interval.

    The ratio is the median of all pairs. The interval inverts the Mann-Whitney test (Hodges &
    Lehmann 1963), which assumes independent times and no distribution; with too few times it is
    (0, infinity).
    Raises ValueError: a series is empty, or a time is not positive.
    """
    if not (len(before) and len(after)) or min(*before, *after) <= 0:
        raise ValueError("both series need times, all of them positive")
    pairs = np.sort(np.subtract.outer(np.log(after), np.log(before)).ravel())
    n, m = len(before), len(after)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    outside = int(n * m / 2 - z * math.sqrt(n * m * (n + m + 1) / 12))
    low, high = (pairs[outside - 1], pairs[-outside]) if outside > 0 else (-math.inf, math.inf)
    return math.exp(np.median(pairs)), math.exp(low), math.exp(high)


def claim(limit: float, before: Sequence[float], after: Sequence[float]) -> dict[str, object]:
    """Return the part of a row that says whether `ratio` is at most ``limit``."""
    estimate, low, high = ratio(before, after)
    verdict = "holds" if high <= limit else "does not hold" if low > limit else "no evidence"
    interval = [low, high] if math.isfinite(high) else None
    return {"ratio": estimate, "interval": interval, "at most": limit, "verdict": verdict}
