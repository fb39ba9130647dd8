"""Time from image files to boxes, stage by stage, by every network and every route through it.

    python -m benchmarks.speed [--version SSD_HarDNet68 ...] [--routes plain deployed compiled]
    python -m benchmarks.speed --checkpoint FILE [--exported FILE ...]

"plain" is the trained network in eager mode and channels first, with softmax and decoding of
everything and a loop over the classes. The other routes are `inference.predictor.Predictor`. Every
route's boxes are compared with those of plain in float32; a route in float32 that finds others is
an error. Networks without a checkpoint have new weights with a few hundred detections an image:
what lower precision finds says nothing of trained networks then.

All routes of all networks take turns on a CPU, those of one network on a GPU, with the same images.
Each stage starts and ends with an idle device. --roofline measures what the device can do at best,
and gives each forward pass as shares of that. --forward times the forward pass alone, for large
batches. A route that fails is a row with its error, and the others go on.

Claims: SSD512-HarDNet68's forward pass takes at most 55 % of SSD512-VGG16's, and HarDNet85's less
than ResNet101's.
"""

import argparse
import gc
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch

from benchmarks import gather, roofline, routes
from benchmarks.harness import Rows, options, program, ratio, run, turns
from benchmarks.routes import PRECISIONS, WAYS, Network, Plain, Route
from data.image import IMAGE_SUFFIXES, read_image
from demo.shapes import make_dataset
from inference.predictor import arrays
from inference.proof import MARGIN, Tolerance, compare, excess
from models import BACKBONES
from tools.traffic import profile
from utils.arguments import positive
from utils.device import choose_device
from utils.errors import UserError, command

TOLERANCE = Tolerance(0.995, score=0.01, pixels=1)
"""For float32: rounding alone moves a score of ResNet101 by 0.001 with new weights."""
CLAIMS = (("SSD_HarDNet68", "SSD_vgg", 0.55), ("SSD_HarDNet85", "SSD_resnet101", 1.0))
"""The first network's forward pass takes at most this share of the second's time, at 512."""


def measure(networks: Sequence[Network], args: argparse.Namespace, files: Sequence[Path],
            batch: int) -> list[Route]:
    """Return the routes of the networks with their boxes compared and their times.

    The comparison is a route's first use, in which it compiles and chooses algorithms.
    """
    gc.collect()
    torch.cuda.empty_cache()
    found: list[Route] = []
    files = [files[i % len(files)] for i in range(batch)]
    for network in networks:
        plain = Route(network, "plain", "fp32", Plain(network, "off"))
        expected = [plain.run([file])[1][0] for file in files]
        for route in routes.routes_of(network, args.routes, args.amp, args.exported):
            found.append(route)
            try:
                route.row = agreement(route, expected, files)
            except UserError:
                raise
            except Exception as error:  # of a compiler, a kernel, the memory
                route.row = {"error": f"{type(error).__name__}: {str(error).strip()[:400]}"}
    calls = {k: timed(route, files, args.forward) for k, route in enumerate(found)
             if "error" not in route.row}
    gc.disable()  # else a collection would be in one route's time, at random
    try:
        for k, rounds in turns(calls, args.rounds).items():
            found[k].times = {stage: [each[stage] for each in rounds] for stage in rounds[0]}
    finally:
        gc.enable()
    return found


def timed(route: Route, files: Sequence[Path], forward: bool) -> Callable[[], dict]:
    """Return the call that is timed; it returns seconds by stage."""
    if forward:
        images = [read_image(file) for file in files]
        return partial(route.forward, route.predictor.preprocess(images))
    return lambda: route.run(files)[0]


def agreement(route: Route, expected: Sequence[dict], files: Sequence[Path]) -> dict:
    """Return the part of a row that says how many of the expected boxes a route finds.

    Raises UserError: neither finds anything.
    """
    floor = route.predictor.detect.config.conf_thresh + MARGIN
    result = compare(arrays(expected), arrays(route.run(files)[1]), floor=floor)
    if not result.boxes:
        raise UserError(f"{route.network.file} finds nothing on {files[0]}, so the routes cannot "
                        "be compared; give other images (--images)")
    row = {"boxes": result.boxes, "matched": result.matched}
    if route.precision == "fp32" and (problem := excess(result, TOLERANCE)):
        row["error"] = f"finds other boxes than the plain network: {problem}"
    return row


def rows_of(found: Sequence[Route], batch: int, limits: dict | None = None) -> Rows:
    """Yield the row of each route; "times faster" compares with the network's first route.

    limits: of `roofline.measure`, for the shares of them.
    """
    first: dict[str, float] = {}
    for route in found:
        row = {"network": route.network.name, "size": route.network.predictor.info.size,
               "route": route.name, "precision": route.precision, "batch": batch,
               "threads": torch.get_num_threads()}
        if route.times:
            seconds = {stage: statistics.median(x) for stage, x in route.times.items()}
            total = seconds.get("total", seconds["forward"])
            row |= {"seconds": seconds, "images a second": batch / total}
            row["times faster"] = first.setdefault(route.network.name, total) / total
            if limits:
                counted = profile(route.network.predictor.net, row["size"])
                how = batch, route.precision, seconds["forward"]
                row["shares"] = roofline.shares(counted, *how, limits)
        yield row | route.row


def claims(forward: Mapping[tuple[str, str, str, int], Sequence[float]]) -> Rows:
    """Yield a row a claim and route, if both networks took it: whether the claim holds.

    forward: seconds of the forward pass at 512 by (network, route, precision, batch).
    """
    for (network, *how), times in forward.items():
        for faster, slower, limit in CLAIMS:
            before = forward.get((slower, *how))
            if network == faster and before:
                estimate, low, high = ratio(before, times)
                verdict = "does not hold" if low > limit else "no evidence"
                yield {"claim": f"time of {faster} / {slower}", "route": how[0],
                       "precision": how[1], "batch": how[2], "ratio": estimate,
                       "interval": [low, high] if high < math.inf else None, "at most": limit,
                       "verdict": "holds" if high <= limit else verdict}


def check(args: argparse.Namespace, device: torch.device) -> None:
    """Raise UserError if options contradict each other or the device."""
    if args.checkpoint and (args.version or args.size):
        raise UserError("--checkpoint knows its network; leave --version and --size out")
    if args.exported and not args.checkpoint:
        raise UserError("--exported goes with the --checkpoint that it was made of")
    for version in args.version or ():
        if (size := args.size or 512) not in BACKBONES[version].sizes:
            raise UserError(f"{version} does not exist at --size {size}; give another --size")
    for amp in args.amp:
        choose_device(args.device, amp)
    gpu = {*args.routes, *args.amp} & {"graph", "gather", "gather_graph", "tf32"}
    if gpu and device.type == "cpu":
        raise UserError(f"{' and '.join(sorted(gpu))} (--routes, --amp) need a GPU")


def files_of(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"{folder} holds no images; give another folder")
    return files


def speed(args: argparse.Namespace, device: torch.device) -> Rows:
    check(args, device)
    limits = roofline.measure(device) if args.roofline else None
    if limits:
        yield {"limits": limits["operations"], "bandwidth": limits["bandwidth"]}
    if args.few_tiles:
        gather.choose_tiles(gather.FEW_TILES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not args.images:
            make_dataset(folder / "drawn", 8, 1, size=(480, 640))
        files = files_of(args.images or folder / "drawn" / "JPEGImages")
        paths, size = [args.checkpoint], args.size or 512
        if not args.checkpoint:
            versions = args.version or [v for v in BACKBONES if size in BACKBONES[v].sizes]
            paths = [routes.new_weights(version, size, folder, files) for version in versions]
        # CUDA graphs keep memory.
        groups = [[path] for path in paths] if device.type == "cuda" else [paths]
        forward: dict = {}
        for group, batch in product(groups, args.batch):
            networks = [routes.open_network(path, device) for path in group]
            with routes.compilations(device):
                found = measure(networks, args, files, batch)
            yield from rows_of(found, batch, limits)
            for route in found:
                if route.times and route.network.predictor.info.size == 512:
                    key = route.network.name, route.name, route.precision, batch
                    forward[key] = route.times["forward"]
            del networks, found, route  # frees memory
        yield from claims(forward)


def parser() -> argparse.ArgumentParser:
    p = program("speed", __doc__, options(speed, 15))
    p.add_argument("--version", nargs="+", choices=BACKBONES, help="with new weights (all)")
    p.add_argument("--size", type=int, choices=(300, 512), help="of the input (512)")
    p.add_argument("--checkpoint", type=Path, metavar="FILE", help="a trained network instead")
    p.add_argument("--exported", type=Path, nargs="+", default=[], metavar="FILE",
                   help="files that tools.export made of it")
    p.add_argument("--routes", nargs="+", choices=["plain", *WAYS], default=["plain", "deployed"])
    p.add_argument("--amp", nargs="+", choices=PRECISIONS, default=["off", "bf16"],
                   help="off: float32; tf32 and fp16: on a GPU (off bf16)")
    p.add_argument("--batch", type=positive, nargs="+", default=[1], help="(1)")
    p.add_argument("--images", type=Path, metavar="FOLDER", help="(drawn)")
    p.add_argument("--forward", action="store_true", help="time the forward pass alone")
    p.add_argument("--roofline", action="store_true", help="measure the device's limits, too")
    p.add_argument("--few_tiles", action="store_true", help="of gathered convolutions, see there")
    return p


main = command(partial(run, parser))

if __name__ == "__main__":
    raise SystemExit(main())
