"""What all benchmarks share: options, rows of results, calls that take turns, and evidence."""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor, nn

from layers import PriorBox
from models import build_net, prior_config
from utils.arguments import Parser, positive
from utils.device import choose_device
from utils.files import write_json

CPU = torch.device("cpu")
CLASSES = 81  # of COCO, with the background
Rows = Iterator[dict[str, object]]
"""Results of a benchmark. A row with an "error" makes its exit status 1."""


def program(name: str, doc: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Return the parser of a benchmark, described by the first line of its module."""
    return Parser(prog=f"python -m benchmarks.{name}", description=doc.split("\n")[0],
                  parents=parents, allow_abbrev=False)


def options(rows: Callable[[argparse.Namespace, torch.device], Rows],
            rounds: int) -> argparse.ArgumentParser:
    """Return the options of all benchmarks, as a parent of their parsers; `run` calls ``rows``."""
    p = argparse.ArgumentParser(add_help=False)
    p.set_defaults(rows=rows)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    p.add_argument("--rounds", type=positive, default=rounds, help="timed rounds (%(default)s)")
    p.add_argument("--json", type=Path, metavar="OUT", help="a file; -: the last line of output")
    return p


def run(parser: Callable[[], argparse.ArgumentParser], argv: Sequence[str] | None) -> int:
    """Run a benchmark: print its rows as they come, with four digits. Return its status."""
    args = parser().parse_args(argv)
    device = choose_device(args.device)
    machine = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as train_test.py
        machine = torch.cuda.get_device_name(device)
    machine, rows = f"{machine}, PyTorch {torch.__version__}", []
    print(machine)
    for row in args.rows(args, device):
        short = json.loads(json.dumps(row), parse_float=lambda text: float(f"{float(text):.4g}"))
        print(json.dumps(short), flush=True)
        rows.append(row)
    if args.json == Path("-"):
        print(json.dumps({"machine": machine, "rows": rows}))
    elif args.json:
        write_json(args.json, {"machine": machine, "rows": rows})
    return int(any("error" in row for row in rows))


def new_net(version: str, size: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    """Return a network of new weights for COCO, always the same, and its priors.

    The network is in training mode and channels-last memory.
    """
    torch.manual_seed(0)
    net = build_net(version, size, CLASSES).to(device, memory_format=torch.channels_last).train()
    return net, PriorBox(prior_config(version, "COCO", size)).to(device)()


def random_images(count: int, size: int) -> Tensor:
    """Return uint8 [count, 3, size, size], always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def turns(calls: Mapping[Hashable, Callable], rounds: int,
          warm_up: int = 2) -> dict[Hashable, list]:
    """Return every call's results. The calls take turns, so that a disturbance meets all of them.

    The first ``warm_up`` rounds are not kept: caches fill and algorithms are chosen in them.
    """
    found = [{name: call() for name, call in calls.items()} for _ in range(warm_up + rounds)]
    return {name: [results[name] for results in found[warm_up:]] for name in calls}


def race(calls: Mapping[Hashable, Callable], rounds: int, device: torch.device,
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


def set_tf32(precision: str) -> None:
    """Let a GPU compute float32 in TF32 if the precision is "tf32"."""
    allowed = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def now(device: torch.device) -> float:
    """Return the clock's seconds once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def ratio(before: Sequence[float], after: Sequence[float],
          confidence: float = 0.99) -> tuple[float, float, float]:
    """Return the ratio of the times ``after`` to the times ``before``, and its interval.

    The ratio is the median of all pairs. The interval inverts the Mann-Whitney test (Hodges &
    Lehmann 1963), which assumes independent times and no distribution; with too few times it is
    (0, infinity).
    """
    pairs = np.sort(np.divide.outer(np.array(after), np.array(before)).ravel())
    n, m = len(before), len(after)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    outside = int(n * m / 2 - z * math.sqrt(n * m * (n + m + 1) / 12))
    low, high = (pairs[outside - 1], pairs[-outside]) if outside > 0 else (0, math.inf)
    return float(np.median(pairs)), float(low), float(high)
