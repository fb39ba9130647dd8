"""Time from image files to boxes, stage by stage, by every network and every route through it.

    python -m benchmarks.speed [--version SSD_HarDNet68 ...] [--size 512] [--batch 1 8]
        [--threads 1 2] [--amp off bf16] [--routes plain deployed compiled] [--images FOLDER]
        [--forward] [--limits] [--device cuda] [--json OUT]
    python -m benchmarks.speed --checkpoint FILE ... [--exported FILE ...]

"plain" is the trained network in eager mode and channels first, with softmax and decoding of
everything and a loop over the classes. The other routes are `inference.predictor.Predictor`. Every
route's boxes are compared with those of plain in float32; a route in float32 that finds others is
an error. Networks without a checkpoint have new weights with a few hundred detections an image:
what lower precision finds says nothing of trained networks then.

All routes of all networks take turns on a CPU, those of one network on a GPU, with the same images.
Each stage starts and ends with an idle device. --forward times the forward pass alone, for large
batches. --limits measures what the device can do at best. A route that fails is a row with its
error, and the others go on.

Claims: SSD512-HarDNet68's forward pass takes at most 55 % of SSD512-VGG16's, and HarDNet85's less
than ResNet101's.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import gather, limits
from benchmarks.harness import Rows, claim, options, program, run, turns, using_threads
from benchmarks.routes import (
    PRECISIONS,
    WAYS,
    Network,
    Plain,
    Route,
    compilations,
    make_images,
    new_weights,
    open_network,
    routes_of,
)
from data.image import IMAGE_SUFFIXES, read_image
from inference.predictor import Predictor
from inference.proof import MARGIN, Tolerance, compare, excess
from models import BACKBONES
from tools.traffic import profile
from utils.arguments import positive
from utils.checkpoint import sha256_of
from utils.device import choose_device
from utils.errors import UserError, command

COMPARED = 2  # images, at least, whose boxes are compared
TOLERANCE = Tolerance(0.995, score=0.01, pixels=1)
"""For float32: rounding alone moves a score of ResNet101 by 0.001 with new weights."""


CLAIMS = (("SSD_HarDNet68", "SSD_vgg", 0.55), ("SSD_HarDNet85", "SSD_resnet101", 1.0))
"""The first network's forward pass takes at most this share of the second's time, at 512."""


class Setting(NamedTuple):
    files: list[Path]
    batch: int
    threads: int
    rounds: int
    forward: bool  # whether the forward pass alone is timed


def measure(networks: Sequence[Network], make: Callable[[Network], Iterator[Route]],
            setting: Setting) -> list[Route]:
    """Return the routes of the networks with their boxes compared and their times.

    The comparison is a route's first use: its time, "first", contains what is compiled or chosen.
    """
    gc.collect()
    torch.cuda.empty_cache()
    routes: list[Route] = []
    for network in networks:
        plain = Route(network, "plain", "fp32", Plain(network, "off"), network.net)
        files = setting.files[: max(setting.batch, COMPARED)]
        expected = [plain.run([file])[1][0] for file in files]
        for route in make(network):
            routes.append(route)
            start = time.perf_counter()
            try:
                route.row = agreement(route, expected, files, setting.batch)
            except UserError:
                raise
            except Exception as error:  # of a compiler, a kernel, the memory
                route.row["error"] = f"{type(error).__name__}: {str(error).strip()[:400]}"
            route.row["first"] = time.perf_counter() - start
    files = [setting.files[i % len(setting.files)] for i in range(setting.batch)]
    calls = {k: timed(route, files, setting) for k, route in enumerate(routes) if fine(route)}
    gc.disable()  # else a collection would be in one route's time, at random
    try:
        for k, rounds in turns(calls, setting.rounds, warm_up=2).items():
            routes[k].times = {stage: [each[stage] for each in rounds] for stage in rounds[0]}
    finally:
        gc.enable()
    return routes


def fine(route: Route) -> bool:
    return "error" not in route.row


def timed(route: Route, files: Sequence[Path], setting: Setting) -> Callable[[], dict]:
    """Return the call that is timed; it returns seconds by stage."""
    if setting.forward:
        images = [read_image(file) for file in files]
        return partial(route.forward, route.predictor.preprocess(images))
    return lambda: route.run(files)[0]


def agreement(route: Route, expected: Sequence[dict], files: Sequence[Path], batch: int) -> dict:
    """Return the part of a row that says how many of the expected boxes a route finds.

    On a GPU also the largest memory of all tensors meanwhile, without what lay there before.
    Raises UserError: neither finds anything.
    """
    device = route.predictor.device
    if gpu := device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    found: list[dict] = []
    for start in range(0, len(files), batch):
        found += route.run([files[i % len(files)] for i in range(start, start + batch)])[1]
    floor = route.predictor.detect.config.conf_thresh + MARGIN
    result = compare(arrays(expected), arrays(found[: len(files)]), floor=floor)
    if not result.boxes:
        raise UserError(f"{route.network.file} finds nothing on the first {len(files)} images, so "
                        "the routes cannot be compared; give others (--images)")
    row = {"boxes": result.boxes, "matched": result.matched}
    if route.precision == "fp32" and (problem := excess(result, TOLERANCE)):
        row["error"] = f"finds other boxes than the plain network: {problem}"
    if gpu:
        row["MiB"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return row


def arrays(found: Sequence[dict[str, Tensor]]) -> list[dict]:
    return [{key: value.numpy() for key, value in each.items()} for each in found]


def rows_of(routes: Sequence[Route], setting: Setting, ceiling: dict | None) -> Rows:
    """Yield the row of each route; "times faster" compares with the network's first route."""
    first: dict[str, float] = {}
    for route in routes:
        row = {"network": route.network.name, "size": route.network.predictor.info.size,
               "route": route.name, "precision": route.precision, "batch": setting.batch,
               "threads": setting.threads}
        if fine(route):
            seconds = {stage: statistics.median(x) for stage, x in route.times.items()}
            total = seconds.get("total", seconds["forward"])
            row |= {"seconds": seconds, "images a second": setting.batch / total}
            row["times faster"] = first.setdefault(route.network.name, total) / total
            if ceiling:
                counted = profile(route.module, row["size"])
                how = (setting.batch, route.precision, seconds["forward"])
                row["shares"] = limits.shares(counted, *how, ceiling)
        yield {**row, **route.row}


def claims(routes: Sequence[Route], setting: Setting) -> Rows:
    """Yield a row a claim and route, if both networks took it at 512."""
    forward = {(route.network.name, route.name, route.precision): route.times["forward"]
               for route in routes if fine(route) and route.network.predictor.info.size == 512}
    for (network, *how), times in forward.items():
        for faster, slower, limit in CLAIMS:
            before = forward.get((slower, *how))
            if network == faster and before:
                yield {"claim": f"time of {faster} / {slower}", "route": how[0],
                       "precision": how[1], "batch": setting.batch, **claim(limit, before, times)}


def check(args: argparse.Namespace, device: torch.device) -> None:
    """Raise UserError if options contradict each other or the device."""
    if args.checkpoint and (args.version or args.size):
        raise UserError("--checkpoint knows its network; leave --version and --size out")
    if args.exported and not args.checkpoint:
        raise UserError("--exported goes with the --checkpoint that it was made of")
    for amp in args.amp:
        choose_device(args.device, amp)
        if amp == "tf32" and device.type == "cpu":
            raise UserError("--amp tf32 needs a GPU")
    for name in args.routes:
        if name != "plain" and WAYS[name].gpu and device.type == "cpu":
            raise UserError(f"--routes {name} needs a GPU")
    known = {sha256_of(file) for file in args.checkpoint if file.is_file()}
    for file in args.exported:
        made_of = Predictor(file).exported.info.checkpoint
        if made_of["sha256"] not in known:
            raise UserError(
                f"{file} was made of another {made_of['file']}, which is none of --checkpoint"
            )


def files_of(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"{folder} holds no images; give another folder")
    return files


def speed(args: argparse.Namespace, device: torch.device) -> Rows:
    check(args, device)
    if args.few_tiles:
        gather.choose_tiles(gather.FEW_TILES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = files_of(args.images) if args.images else make_images(folder)
        for size in [None] if args.checkpoint else args.size or [512]:
            paths = args.checkpoint
            if size:
                versions = args.version or [v for v in BACKBONES if size in BACKBONES[v].sizes]
                paths = [new_weights(version, size, folder, files) for version in versions]
            for threads in args.threads or [torch.get_num_threads()]:
                with using_threads(threads):
                    yield from measure_all(args, device, paths, files)


def measure_all(args: argparse.Namespace, device: torch.device, paths: Sequence[Path],
                files: list[Path]) -> Rows:
    threads, ceiling = torch.get_num_threads(), None
    if args.limits:
        ceiling = limits.measure(device)
        yield {"limits": ceiling["operations"], "bandwidth": ceiling["bandwidth"]}
    groups = [[path] for path in paths] if device.type == "cuda" else [paths]  # graphs keep memory
    settings = [Setting(files, batch, threads, args.rounds, args.forward) for batch in args.batch]
    done: list[list[Route]] = [[] for _ in settings]
    for group in groups:
        networks = [open_network(path, device) for path in group]
        for setting, timed_routes in zip(settings, done, strict=True):
            with compilations(device) if "compiled" in args.routes else nullcontext():
                routes = measure(
                    networks,
                    lambda net: routes_of(net, args.routes, args.amp, args.exported, threads),
                    setting,
                )
            yield from rows_of(routes, setting, ceiling)
            for route in routes:
                route.predictor = None  # frees memory
            timed_routes += routes
    for setting, routes in zip(settings, done, strict=True):
        yield from claims(routes, setting)


def parser() -> argparse.ArgumentParser:
    p = program("speed", __doc__, options(speed, 15))
    p.add_argument("--version", nargs="+", choices=BACKBONES, metavar="VERSION",
                   help=f"networks, with new weights (all): {', '.join(BACKBONES)}")
    p.add_argument("--size", type=int, nargs="+", choices=(300, 512), help="of the input (512)")
    p.add_argument("--checkpoint", type=Path, nargs="+", default=[], metavar="FILE",
                   help="trained networks instead")
    p.add_argument("--exported", type=Path, nargs="+", default=[], metavar="FILE",
                   help="files that tools.export made of them")
    p.add_argument("--routes", nargs="+", choices=["plain", *WAYS], default=["plain", "deployed"],
                   metavar="ROUTE", help=f"{', '.join(['plain', *WAYS])} (plain deployed)")
    p.add_argument("--amp", nargs="+", choices=PRECISIONS, default=["off", "bf16"],
                   help="off: float32; tf32 and fp16: on a GPU (off bf16)")
    p.add_argument("--batch", type=positive, nargs="+", default=[1], help="(1)")
    p.add_argument("--threads", type=positive, nargs="+", help="(PyTorch's default)")
    p.add_argument("--images", type=Path, metavar="FOLDER", help="(made up)")
    p.add_argument("--forward", action="store_true", help="time the forward pass alone")
    p.add_argument("--limits", action="store_true", help="measure the device's limits")
    p.add_argument("--few_tiles", action="store_true", help="of gathered convolutions, see there")
    return p


main = command(partial(run, parser))

if __name__ == "__main__":
    raise SystemExit(main())
