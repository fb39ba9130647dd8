"""From picture files to boxes, stage by stage, by every network and every route through it.

    python -m benchmarks.speed [--version SSD_HarDNet68 ...] [--size 512] [--batch 1 8]
        [--threads 1 2] [--amp off bf16] [--routes plain deployed compiled] [--pictures FOLDER]
        [--device cuda] [--roofline] [--json OUT]
    python -m benchmarks.speed --checkpoint FILE ... [--exported FILE ...]
    python -m benchmarks.speed --compare BEFORE.json AFTER.json

"plain" is the network as it was trained, in eager mode and channels first, with softmax and
decoding of everything and a loop over the classes. The other routes are `models.Predictor`, and
must find plain's boxes before they are timed. Networks without a checkpoint have new weights, whose
outputs are stretched to a few hundred scores over the threshold; how many boxes lower precision
finds again tells nothing of trained ones then. All routes of all networks take turns within every
round, on the same pictures; the times of all rounds are kept. On a GPU each stage starts and ends
with an idle device. A route in float32 that finds other boxes is left out, and the exit status 1.

The claims: SSD512-HarDNet68's forward pass takes at most 55 % of SSD512-VGG16's, and HarDNet85's
less than ResNet101's.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.evidence import (
    CONFIDENCE,
    as_json,
    describe,
    differences,
    interval,
    judge,
    ratio,
)
from benchmarks.roofline import ceilings, shares, tensor_float
from benchmarks.timing import CPU, write
from data.config import INPUT_MEAN
from data.image import IMAGE_SUFFIXES, read_image
from inference.deploy import deploy
from inference.predictor import Predictor
from inference.proof import MARGIN, Tolerance, compare, excess
from inference.runtime import EXPORTED_SUFFIXES, import_package
from layers import Detect
from layers.boxes import decode
from models import BACKBONES, build_net
from tools.traffic import profile
from utils.arguments import positive
from utils.checkpoint import load_checkpoint, load_weights, sha256_of
from utils.device import AMP_TYPES, autocast, choose_device
from utils.errors import UserError, command
from utils.files import check_writable

STAGES = ("decode", "preprocess", "forward", "postprocess")
CLASSES = 81
SCORES_OVER = 300
"""Scores over the threshold of a picture that new weights are made to give."""
MADE_UP = (8, 640, 480)
"""Pictures that are drawn where none are given: number, width, height."""
COMPARED = 2
"""Pictures, at least, whose boxes are compared."""
TOLERANCE = Tolerance(0.995, score=0.01, pixels=1)
"""For float32: rounding alone moves a score of ResNet101 by 0.001 where weights are new."""
PRECISIONS = {"off": "fp32", "tf32": "tf32", "bf16": "bf16", "fp16": "fp16"}
"""By --amp."""


@dataclass(frozen=True)
class Claim:
    """That a network's time is at most ``limit`` of another's, at 512."""

    faster: str
    slower: str
    limit: float


CLAIMS = (
    Claim("SSD_HarDNet68", "SSD_vgg", 0.55),
    Claim("SSD_HarDNet85", "SSD_resnet101", 1.0),
)


# ---------------------------------------------------------------- networks


@dataclass(frozen=True)
class Network:
    """A trained detector."""

    name: str
    file: Path
    net: nn.Module
    """As it was trained: float32, channels first, in evaluation mode."""
    predictor: Predictor

    def deployed(self, gather: bool, amp: str) -> nn.Module:
        if not gather and amp == "off":
            return self.predictor.net
        return deploy(self.net, gather).to(self.predictor.device, AMP_TYPES[amp])


def open_network(file: Path, device: str) -> Network:
    predictor = Predictor(file, device=device)
    about = predictor.info
    net = build_net(about.version, about.size, len(about.classes) + 1).eval()
    load_weights(net, load_checkpoint(file)["model"], file)
    return Network(about.version, file, net.to(predictor.device), predictor)


@torch.no_grad()
def stretch(net: nn.Module, images: Tensor, threshold: float = 0.02) -> nn.Module:
    """Give new weights outputs in the shape of a trained network's, and return ``net``.

    Batch norms take the statistics of ``images``, heads get offsets of standard deviation 0.5 and
    logits of 3, and backgrounds are so sure that a picture has ``SCORES_OVER`` scores over
    ``threshold``.
    """
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # the mean of all batches, which is one
            norm.reset_running_stats()
    net.train()(images)
    logits = []
    for x, *heads in zip(net.eval().sources(images), net.loc, net.conf, strict=True):
        for head, deviation in zip(heads, (0.5, 3), strict=True):
            outputs = head(x)
            centre = outputs.mean((0, 2, 3))
            spread = (outputs - centre[:, None, None]).square().mean().sqrt()
            # Of a map of one cell, pictures that are alike give almost none.
            scale = deviation / spread.clamp_min(0.01 * outputs.square().mean().sqrt())
            head.weight *= scale
            head.bias.copy_((head.bias - centre) * scale)
        logits.append(head(x).permute(0, 2, 3, 1).reshape(-1, net.num_classes))
    background, others = torch.cat(logits).double().split([1, net.num_classes - 1], 1)
    # A score is over the threshold as long as the background is raised by less than so much.
    room = (others.exp() / threshold - others.exp().sum(1, keepdim=True)).log() - background
    most = room.nan_to_num(-torch.inf).flatten().topk(SCORES_OVER * len(images)).values
    for head in net.conf:
        head.bias[:: net.num_classes] += most[-1]
    return net


def new_weights(version: str, size: int, folder: Path, files: Sequence[Path]) -> Path:
    """A checkpoint of new weights, the same with every call."""
    torch.manual_seed(0)
    images = [cv2.resize(read_image(file), (size, size)) for file in files[:2] * 2][:2]
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) - mean_of()
    net = stretch(build_net(version, size, CLASSES), images)
    path = folder / f"{version}_{size}.pth"
    torch.save(net.state_dict(), path)
    return path


def mean_of() -> Tensor:
    return torch.tensor(INPUT_MEAN, dtype=torch.float32)[:, None, None]


# ---------------------------------------------------------------- routes


class Plain(Predictor):
    """The stages as a straightforward program has them; same results as those of Predictor."""

    def __init__(self, network: Network, amp: str) -> None:
        vars(self).update(vars(network.predictor))
        self.net, self.amp = network.net, amp

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        with autocast(self.device, self.amp):
            return super().forward(batch)

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor:
        pixels = self.stack(images).to(self.device).float().contiguous()
        return pixels - mean_of().to(self.device)

    @torch.inference_mode()
    def postprocess(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        found = plain_detections(self.detect, outputs["loc"], outputs["conf"], self.priors, sizes)
        return [{key: value.cpu() for key, value in each.items()} for each in found]


def plain_detections(
    detect: Detect, loc: Tensor, conf: Tensor, priors: Tensor, sizes: Sequence[tuple[int, int]]
) -> list[dict[str, Tensor]]:
    """Softmax and decoding of everything, then image by image and class by class."""
    nms = import_package("torchvision.ops", "test").nms
    scores = conf.float().softmax(2)
    boxes = decode(loc.float(), priors, detect.variance)
    found = []
    for score_of, box_of, size in zip(scores, boxes, sizes, strict=True):
        box_of = box_of * torch.tensor([*size, *size], device=loc.device)
        wider = box_of + torch.tensor([0, 0, 1, 1], device=loc.device)  # pixel convention
        parts = []
        for label in range(1, conf.shape[2]):
            over = score_of[:, label] > detect.config.conf_thresh
            score = score_of[over, label]
            kept = nms(wider[over], score, detect.config.nms_thresh)[: detect.config.per_class]
            parts.append((box_of[over][kept], score[kept], torch.full_like(kept, label)))
        box, score, label = (torch.cat(columns) for columns in zip(*parts, strict=True))
        best = score.argsort(descending=True, stable=True)[: detect.config.top_k]
        found.append({"boxes": box[best], "scores": score[best], "labels": label[best]})
    return found


class Graphed:
    """A network in a CUDA graph, which is captured with the first batch.

    Batches must be alike; outputs are overwritten by the next call.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.graph is None:
            self._capture(images)
        self.images.copy_(images)
        self.graph.replay()
        return self.outputs

    def _capture(self, images: Tensor) -> None:
        self.images = images.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # algorithms are chosen, kernels compiled
                self.net(self.images)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = self.net(self.images)


def compiled(net: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """By TorchInductor, on a GPU in CUDA graphs; called within ``compilations``.

    A whole graph or an error, where otherwise it would silently be eager mode after all.
    """
    mode = "reduce-overhead" if next(net.parameters()).is_cuda else None
    return torch.compile(net, mode=mode, fullgraph=True, dynamic=False)


@contextmanager
def compilations(device: torch.device) -> Iterator[None]:
    """Compile anew within the block, as generated code has a number of threads in it; on a CPU with
    frozen weights, which can then be packed.

    The limit of compilations holds for all networks together, as they have their class in common.
    Freezing is no option of ``torch.compile``: tracing, too, must know of it.
    """
    torch.compiler.reset()
    with (
        torch._dynamo.config.patch(cache_size_limit=256),
        torch._inductor.config.patch(freezing=device.type == "cpu"),
    ):
        yield


@dataclass(frozen=True)
class Way:
    """How a deployed network runs."""

    gather: bool = False
    """Of ``inference.deploy.deploy``."""
    wrap: Callable[[nn.Module], Callable] = lambda net: net
    gpu: bool = False
    """Only there."""


WAYS = {
    "deployed": Way(),
    "compiled": Way(wrap=compiled),
    "gather": Way(gather=True, gpu=True),
    "graph": Way(wrap=Graphed, gpu=True),
    "gather_graph": Way(True, Graphed, gpu=True),
}
"""Routes by name, beside "plain"."""


@dataclass
class Route:
    """A way from picture files to boxes, and what was measured of it."""

    network: Network
    name: str
    precision: str
    predictor: Predictor
    profiled: nn.Module
    seconds: dict[str, list[float]] = field(
        default_factory=lambda: {stage: [] for stage in (*STAGES, "total")}
    )
    agreement: dict = field(default_factory=dict)
    others: float | None = None
    """Cores that other programs used meanwhile."""

    def __str__(self) -> str:
        return f"{self.network.name} {self.name} {self.precision}"

    def run(self, files: Sequence[Path]) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
        """Seconds of each stage and of all, and the detections."""
        with tensor_float(self.precision == "tf32"):
            watch, found = Stopwatch(self.predictor.device), []
            images = [read_image(file) for file in files]
            watch.lap("decode")
            for group in self.predictor.batches(images):
                batch = self.predictor.preprocess(group)
                watch.lap("preprocess")
                outputs = self.predictor.forward(batch)
                watch.lap("forward")
                sizes = [(image.shape[1], image.shape[0]) for image in group]
                found += self.predictor.postprocess(outputs, sizes)
                watch.lap("postprocess")
        return {**watch.laps, "total": watch.last - watch.start}, found


class Stopwatch:
    """Seconds by stage, from an idle device to an idle device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps = dict.fromkeys(STAGES, 0.0)
        self.start = self.last = self._now()

    def lap(self, stage: str) -> None:
        now = self._now()
        self.laps[stage] += now - self.last
        self.last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def routes_of(
    network: Network, names: Sequence[str], amps: Sequence[str], exported: Sequence[Path],
    threads: int,
) -> Iterator[Route]:  # fmt: skip
    """Every route that there is; plain in float32 alone on a CPU, of which it is the baseline."""
    device = network.predictor.device
    for name in names:
        for amp in amps:
            mode = "off" if amp == "tf32" else amp
            if name == "plain":
                if device.type == "cpu" and amp != "off":
                    continue
                predictor, net = Plain(network, mode), network.net
            else:
                way, predictor = WAYS[name], copy.copy(network.predictor)
                net = network.deployed(way.gather, mode)
                predictor.net = way.wrap(net)
            yield Route(network, name, PRECISIONS[amp], predictor, net)
    for file in exported:
        predictor = Predictor(file, threads=threads)
        about = predictor.exported.info
        if about.checkpoint["sha256"] == sha256_of(network.file):
            yield Route(network, file.name, about.precision, predictor, network.predictor.net)


# ---------------------------------------------------------------- the measurement


class OtherBoxes(Exception):
    """A route does not find what the plain one does: one sentence."""


def measure(
    networks: Sequence[Network],
    make: Callable[[Network], Iterator[Route]],
    files: Sequence[Path],
    batch: int,
    rounds: int,
    warm_up: int = 1,
) -> tuple[list[Route], list[str]]:
    """Check what the routes of the networks find, then time them in turns, ``batch`` files a time.

    The check is the first use of a route: what is compiled or chosen then is not timed.

    Returns:
        The routes that were timed, and a sentence for each in float32 that was not because it finds
        other boxes than the plain one.

    Raises:
        UserError: the network finds nothing.
    """
    routes, differing = [], []
    for network in networks:
        plain = Route(network, "plain", "fp32", Plain(network, "off"), network.net)
        count = min(max(batch, COMPARED), len(files))
        expected = [plain.run([file])[1][0] for file in files[:count]]
        for route in make(network):
            try:
                route.agreement = agreement(route, expected, files[:count], batch)
                routes.append(route)
            except OtherBoxes as error:
                size, threads = network.predictor.info.size, torch.get_num_threads()
                differing.append(f"{error} (size {size}, batch {batch}, {threads} threads)")
            except torch.OutOfMemoryError:
                print(f"{route} at batch {batch} is left out: the memory does not suffice")
    work = OtherWork()
    with no_collection():
        for turn in range(-warm_up, rounds):
            turn_files = [files[(turn * batch + i) % len(files)] for i in range(batch)]
            for route in routes:
                seconds, _ = route.run(turn_files)
                if turn >= 0:
                    for stage, value in seconds.items():
                        route.seconds[stage].append(value)
    others = work.cores()
    for route in routes:
        route.others = others
    return routes, differing


def agreement(
    route: Route, expected: Sequence[dict[str, Tensor]], files: Sequence[Path], batch: int
) -> dict:
    """How many of plain's boxes a route finds, and on a GPU the memory that it takes to.

    Returns:
        What ``inference.proof.compare`` does, and "bytes": the most memory of all tensors, without
        what lay there before, None on the CPU.

    Raises:
        OtherBoxes: the route is in float32 and differs more than ``TOLERANCE`` allows.
        UserError: neither finds anything.
    """
    device = route.predictor.device
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    found = []
    for start in range(0, len(files), batch):
        group = [files[i % len(files)] for i in range(start, start + batch)]
        found += route.run(group)[1]
    result = compare(
        *([{key: each[key].numpy() for key in each} for each in some]
          for some in (expected, found[: len(files)])),
        floor=route.predictor.detect.config.conf_thresh + MARGIN,
    )  # fmt: skip
    if not result.boxes:
        raise UserError(
            f"{route.network.file} finds nothing on the first {len(files)} pictures, so the routes "
            "cannot be compared; give others (--pictures)"
        )
    if route.precision == "fp32":
        problem = excess(result, TOLERANCE)
        if problem:
            raise OtherBoxes(f"{route} finds other boxes than the plain network: {problem}")
    peak = torch.cuda.max_memory_allocated(device) - before if gpu else None
    return {**asdict(result), "bytes": peak}


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """So many threads for PyTorch and OpenCV within the block."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    try:
        torch.set_num_threads(count)
        cv2.setNumThreads(count)
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection within the block: it would be in one route's time, at random."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class OtherWork:
    """Tells how many cores other programs have used since it was made."""

    def __init__(self) -> None:
        self.start, self.before = time.monotonic(), self._seconds()

    def cores(self) -> float | None:
        """The mean; None where the system does not tell."""
        now = self._seconds()
        if now is None or self.before is None:
            return None
        return max(0.0, now - self.before) / (time.monotonic() - self.start)

    @staticmethod
    def _seconds() -> float | None:
        """Seconds of all cores, less those of this process."""
        if not Path("/proc/stat").is_file():
            return None
        user, nice, system, _, _, *interrupts, steal = map(
            int, Path("/proc/stat").read_text().split()[1:9]
        )
        ticks = user + nice + system + sum(interrupts) + steal
        return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def row_of(route: Route, batch: int, threads: int, ceiling: dict | None) -> dict:
    """A route's times as JSON has them; seconds are those of a batch."""
    median = {stage: statistics.median(times) for stage, times in route.seconds.items()}
    info = route.predictor.info
    row = {
        "network": info.version,
        "size": info.size,
        "route": route.name,
        "precision": route.precision,
        "batch": batch,
        "threads": threads,
        "seconds": route.seconds,
        "median": median,
        "p95": {stage: float(np.percentile(x, 95)) for stage, x in route.seconds.items()},
        "pictures_per_second": batch / median["total"],
        "agreement": route.agreement,
        "others": route.others,
    }
    if ceiling:
        counted = profile(route.profiled, info.size)
        row["shares"] = shares(counted, batch, route.precision, median["forward"], ceiling)
    return row


KEY = ("network", "size", "route", "precision", "batch", "threads")
"""What tells one row from another."""


def judge_claims(rows: Sequence[dict]) -> list[dict]:
    """What the rows say of every claim, on each route that both of its networks took."""
    by_key = {tuple(row[key] for key in KEY): row for row in rows}
    found = []
    for claim in CLAIMS:
        for (name, size, *how), row in by_key.items():
            other = by_key.get((claim.slower, size, *how))
            if name != claim.faster or size != 512 or other is None:
                continue
            times = ratio(other["seconds"]["forward"], row["seconds"]["forward"])
            verdict = (
                "holds" if times.high <= claim.limit
                else "does not hold" if times.low > claim.limit
                else "no evidence"
            )  # fmt: skip
            found.append({
                "network": claim.faster, "beside": claim.slower, "limit": claim.limit,
                **dict(zip(KEY[1:], (size, *how), strict=True)),
                **as_json(times), "verdict": verdict,
            })  # fmt: skip
    return found


def made_up(folder: Path, count: int, width: int, height: int) -> list[Path]:
    """JPEG files of soft colours under some noise, about as large as photographs are."""
    rng = np.random.default_rng(0)
    files = []
    for i in range(count):
        colours = rng.integers(0, 256, (9, 12, 3), np.uint8)
        image = cv2.resize(colours, (width, height), interpolation=cv2.INTER_CUBIC)
        image = np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
        files.append(folder / f"{i}.jpg")
        cv2.imwrite(str(files[-1]), image)
    return files


def picture_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"{folder} holds no pictures; give another folder")
    return files


# ---------------------------------------------------------------- where it was measured


def environment(device: torch.device, exported: Sequence[Path]) -> dict:
    """The machine and the versions that times depend on."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), cpu)
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    versions |= {"opencv": cv2.__version__, "torch": torch.__version__}
    versions |= dict(Predictor(file).exported.runtime for file in exported)
    found = {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform()}
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return {**found, "versions": versions}


def disturbed(cores: float | None) -> bool:
    """Whether other programs used so many cores that it shows."""
    return cores is not None and cores > 0.1


# ---------------------------------------------------------------- what is printed


def show(rows: Sequence[dict]) -> None:
    """A line a row, in milliseconds; ratios are to the first row of the network."""
    first: dict[str, dict] = {}
    print(f"{'':38}" + "".join(f"{stage:>12}" for stage in (*STAGES, "total", "p95"))
          + f"{'pictures/s':>12}   ratio  boxes matched")  # fmt: skip
    for row in rows:
        median = {**row["median"], "p95": row["p95"]["total"]}
        speedup = (
            row["pictures_per_second"]
            / first.setdefault(row["network"], row)["pictures_per_second"]
        )
        line = f"{row['network']:16} {row['size']} {row['route']:12} {row['precision']:4}"
        line += "".join(f"{1e3 * seconds:12.2f}" for seconds in median.values())
        line += f"{row['pictures_per_second']:12.2f}  x{speedup:5.2f}"
        line += f"  {100 * row['agreement']['matched']:.2f} % of {row['agreement']['boxes']}"
        if row["agreement"]["bytes"] is not None:
            line += f", {row['agreement']['bytes'] / 2**20:.0f} MiB"
        for what, share in row.get("shares", {}).items():
            line += f", {share:.0%} of the {what}"
        print(line, flush=True)
    if rows and disturbed(rows[0]["others"]):
        print(
            f"warning: other programs used {rows[0]['others']:.1f} of {os.cpu_count()} cores "
            "meanwhile; these times are not to be trusted"
        )


def show_best(rows: Sequence[dict]) -> None:
    """The batch of each route at which its forward pass takes the most pictures a second."""
    best: dict[tuple, tuple[float, int]] = {}
    for row in rows:
        rate = row["batch"] / row["median"]["forward"]
        way = tuple(row[key] for key in KEY if key != "batch")
        best[way] = max(best.get(way, (0, 0)), (rate, row["batch"]))
    for (*how, threads), (rate, batch) in best.items():
        print(f"{' '.join(map(str, how))}, {threads} threads: at best {rate:.1f} pictures a second "
              f"through the network, at batch {batch}")  # fmt: skip


def show_ceiling(ceiling: dict) -> None:
    rates = ", ".join(f"{name} {x / 1e12:.2f}" for name, x in ceiling["operations"].items())
    print(
        f"measured: copies of {ceiling['bandwidth'] / 1e9:.0f} GB/s, in a cache "
        f"{ceiling['bandwidth_in_cache'] / 1e9:.0f}; 10^12 operations/s of matrix products: {rates}"
    )


def show_claims(claims: Sequence[dict]) -> None:
    for x in claims:
        how = f"{x['route']} {x['precision']}, batch {x['batch']}, {x['threads']} threads"
        print(
            f"{x['network']}'s forward pass takes {x['ratio']:.3f} ({interval(x)}) of "
            f"{x['beside']}'s ({how}); at most {x['limit']:g}: {x['verdict']}"
        )


# ---------------------------------------------------------------- two runs


def compare_runs(before: dict, after: dict) -> dict:
    """What two files of this program tell of a change between them.

    Returns:
        "differ": what besides the change is not the same, in lines; "rows": one a row of both, its
        key, by stage what ``evidence.judge`` says, and "others" of both; "alone": keys of rows of
        one file only; "decode": the judgement of all decoding, in which no network has a part.

        A stage more, "total beside plain", is of the ratios to plain's total in the same round,
        where there is one: what disturbs a whole run is not in them.
    """
    runs = [{tuple(row[key] for key in KEY): row for row in run["rows"]} for run in (before, after)]
    both = [key for key in runs[0] if key in runs[1]]
    rows = []
    for key in both:
        pair = [run[key]["seconds"] for run in runs]
        stages = {stage: judge(*(x[stage] for x in pair)) for stage in (*STAGES, "total")}
        network, size, route, _, *how = key
        plain = (network, size, "plain", "fp32", *how)
        if plain in both and route != "plain":
            stages["total beside plain"] = judge(
                *(np.divide(run[key]["seconds"]["total"], run[plain]["seconds"]["total"]).tolist()
                  for run in runs)
            )  # fmt: skip
        others = [run[key].get("others") for run in runs]
        rows.append({**dict(zip(KEY, key, strict=True)), "stages": stages, "others": others})
    # Of a round: what a row has is noise, and rows of other batches are no series.
    decoding = [np.sum([run[key]["seconds"]["decode"] for key in both], 0) for run in runs]
    return {
        "differ": [
            line
            for part in ("environment", "pictures")
            for line in differences(before[part], after[part], part)
        ],
        "rows": rows,
        "alone": [list(key) for key in dict.fromkeys([*runs[0], *runs[1]]) if key not in both],
        "decode": judge(*(x.tolist() for x in decoding)) if both else None,
    }


def read_run(path: Path) -> dict:
    try:
        run = json.loads(path.read_text("utf-8"))
        rows_have = {*KEY, "seconds"}
        right = all(rows_have <= row.keys() for row in run["rows"])
        right &= run.keys() >= {"environment", "pictures"}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        right = False
    if not right:
        raise UserError(f"{path} is no file of benchmarks.speed; write one with --json")
    return run


def show_comparison(found: dict) -> None:
    for line in found["differ"]:
        print(f"not the same: {line}")
    for row in found["rows"]:
        *how, batch, threads = (row[key] for key in KEY)
        print(f"{' '.join(map(str, how))}, batch {batch}, {threads} threads")
        for stage, judged in row["stages"].items():
            print(f"  {stage:18} x{judged['ratio']:.3f}  {describe(judged)}")
    for key in found["alone"]:
        print(f"in one of the files only: {' '.join(map(str, key))}")
    for name, cores in zip(
        ("before", "after"),
        zip(*(row["others"] for row in found["rows"]), strict=True),
        strict=False,
    ):
        worst = max(filter(None, cores), default=None)
        if disturbed(worst):
            print(
                f"{name}, other programs used up to {worst:.1f} cores: that is in its times, too; "
                "only what is beside plain can be trusted"
            )
    if found["decode"] and found["decode"]["verdict"] != "no evidence":
        print(
            f"decoding, in which no network has a part, is {describe(found['decode'])}: unless it "
            "was changed, the machine was in another state, and so much of the rest is due to that"
        )


# ---------------------------------------------------------------- command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    # fmt: off
    p.add_argument("--version", nargs="+", choices=BACKBONES, metavar="VERSION",
                   help=f"networks, with new weights (all): {', '.join(BACKBONES)}")
    p.add_argument("--size", type=int, nargs="+", help="sides of the input (512)")
    p.add_argument("--checkpoint", type=Path, nargs="+", default=[], metavar="FILE",
                   help="trained networks instead")
    p.add_argument("--exported", type=Path, nargs="+", default=[], metavar="FILE",
                   help=f"what was made of them: {', '.join(EXPORTED_SUFFIXES)}")
    p.add_argument("--routes", nargs="+", choices=["plain", *WAYS], default=["plain", "deployed"],
                   metavar="ROUTE", help=", ".join(["plain", *WAYS]) + " (plain deployed)")
    p.add_argument("--amp", nargs="+", choices=PRECISIONS, default=["off", "bf16"],
                   help="off: float32; tf32 and fp16: on a GPU (off bf16)")
    p.add_argument("--batch", type=positive, nargs="+", default=[1], help="(1)")
    p.add_argument("--threads", type=positive, nargs="+", help="(as many as PyTorch takes)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--pictures", type=Path, metavar="FOLDER", help="(made up)")
    p.add_argument("--rounds", type=positive, default=15, help="(15)")
    p.add_argument("--roofline", action="store_true",
                   help="measure what the device can do, and how much of it is reached")
    p.add_argument("--json", type=Path, metavar="OUT", help="-: in one line to standard output")
    p.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"),
                   help=f"two files of --json, by {CONFIDENCE:.0%} intervals; nothing is measured")
    # fmt: on
    return p.parse_args(argv)


def check(args: argparse.Namespace) -> torch.device:
    """The device; UserError where options do not go together."""
    if args.checkpoint and (args.version or args.size):
        raise UserError("--checkpoint knows its network; leave --version and --size out")
    if args.exported and not args.checkpoint:
        raise UserError("--exported goes with the --checkpoint that it was made of")
    devices = [choose_device(args.device, amp) for amp in args.amp]
    if devices[0].type == "cpu":
        if "tf32" in args.amp:
            raise UserError("--amp tf32 needs a GPU")
        for name in args.routes:
            if name in WAYS and WAYS[name].gpu:
                raise UserError(f"--routes {name} needs a GPU")
    known = {sha256_of(file) for file in args.checkpoint if file.is_file()}
    for file in args.exported:
        made_of = Predictor(file).exported.info.checkpoint
        if made_of["sha256"] not in known:
            raise UserError(
                f"{file} was made of another {made_of['file']}, which is none of --checkpoint"
            )
    return devices[0]


def measure_all(args: argparse.Namespace, device: torch.device, folder: Path) -> dict:
    """All that was asked for, as JSON has it."""
    files = picture_files(args.pictures) if args.pictures else made_up(folder, *MADE_UP)
    rows, differing, found_ceilings = [], [], {}
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    threads = args.threads or [torch.get_num_threads()]
    if args.roofline:
        for count in threads:
            with using_threads(count):
                found_ceilings[str(count)] = ceilings(device)
                show_ceiling(found_ceilings[str(count)])
    for size in [None] if args.checkpoint else args.size or [512]:
        paths = args.checkpoint
        if size:
            versions = args.version or [v for v in BACKBONES if size in BACKBONES[v].sizes]
            paths = [new_weights(version, size, folder, files) for version in versions]
        networks = [open_network(path, str(device)) for path in paths]
        for count in threads:
            for batch in args.batch:
                compiling = "compiled" in args.routes
                with using_threads(count), compilations(device) if compiling else nullcontext():
                    routes, others = measure(
                        networks,
                        lambda network, count=count: routes_of(
                            network, args.routes, args.amp, args.exported, count
                        ),
                        files,
                        batch,
                        args.rounds,
                    )
                ceiling = found_ceilings.get(str(count))
                new = [row_of(route, batch, count, ceiling) for route in routes]
                print(f"batch {batch}, {count} threads; milliseconds")
                show(new)
                rows += new
                differing += others
    if len(args.batch) > 1:
        show_best(rows)
    return {
        "environment": environment(device, args.exported),
        "pictures": {"of": str(args.pictures or "made up"), "count": len(files)},
        "rounds": args.rounds,
        "ceilings": found_ceilings,
        "rows": rows,
        "differing": differing,
        "claims": judge_claims(rows),
    }


@command
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.json and args.json != Path("-"):
        check_writable(args.json)
    if args.compare:
        found = compare_runs(*map(read_run, args.compare))
        show_comparison(found)
        write(args.json, CPU, **found)
        return 0
    device = check(args)
    work = OtherWork()
    time.sleep(0.3)
    if disturbed(work.cores()):
        print(f"warning: other programs use {work.cores():.1f} of {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        found = measure_all(args, device, Path(folder))
    show_claims(found["claims"])
    write(args.json, device, **found)
    for sentence in found["differing"]:
        print(f"error: {sentence}", file=sys.stderr)
    return 1 if found["differing"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
