"""Networks to time, and the routes through them from image files to boxes."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import CLASSES, CPU, new_net, now, set_tf32
from benchmarks.nms import plain_detections
from data.config import INPUT_MEAN
from data.image import read_image
from inference.deploy import deploy
from inference.predictor import Predictor
from models.info import load_detector
from utils.checkpoint import sha256_of
from utils.device import AMP_TYPES, autocast
from utils.errors import UserError

PRECISIONS = {"off": "fp32", "tf32": "tf32", "bf16": "bf16", "fp16": "fp16"}  # by --amp
MEAN = torch.tensor(INPUT_MEAN, dtype=torch.float32)[:, None, None]
SCORES_OVER = 300  # scores over the threshold that new weights give an image


class Network(NamedTuple):
    name: str
    file: Path
    net: nn.Module  # as it was trained: float32, channels first, in evaluation mode
    predictor: Predictor


def open_network(file: Path, device: torch.device) -> Network:
    net, info = load_detector(file)
    return Network(info.version, file, net.to(device), Predictor(file, device=str(device)))


def new_weights(version: str, size: int, folder: Path, files: Sequence[Path]) -> Path:
    """Write a checkpoint of new weights, always the same, and return it; see `stretch`."""
    net, _ = new_net(version, size, CPU)
    images = np.stack([cv2.resize(read_image(file), (size, size)) for file in files[:2]])
    stretch(net, torch.from_numpy(images).permute(0, 3, 1, 2) - MEAN)
    path = folder / f"{version}_{size}.pth"
    classes = [f"class {k}" for k in range(1, CLASSES)]
    config = {"version": version, "size": size, "dataset": "COCO", "priors": "COCO"}
    torch.save({"model": net.state_dict(), "classes": classes, "config": config}, path)
    return path


@torch.no_grad()
def stretch(net: nn.Module, images: Tensor, threshold: float = 0.02) -> None:
    """Give new weights outputs in the shape of a trained network's.

    Batch norms take the statistics of ``images``. Offsets get a standard deviation of 0.5 and
    logits of 3. The background is raised until an image has ``SCORES_OVER`` scores over
    ``threshold``.
    """
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # the mean of all batches, here one
            norm.reset_running_stats()
    net.train()(images)
    logits = []
    for x, *heads in zip(net.eval().sources(images), net.loc, net.conf, strict=True):
        for head, deviation in zip(heads, (0.5, 3), strict=True):
            outputs = head(x)
            centre = outputs.mean((0, 2, 3))
            # Similar images hardly differ in a map of one cell.
            spread = (outputs - centre[:, None, None]).std().clamp_min(0.01 * outputs.std())
            last = getattr(head, "norm", head)
            last.bias.copy_((last.bias - centre) * deviation / spread)
            last.weight *= deviation / spread
        logits.append(head(x).permute(0, 2, 3, 1).reshape(-1, net.num_classes))
    background, others = torch.cat(logits).double().split([1, net.num_classes - 1], 1)
    # A score stays over the threshold as long as the background is raised by less than this.
    room = (others.exp() / threshold - others.exp().sum(1, keepdim=True)).log() - background
    most = room.nan_to_num(-torch.inf).flatten().topk(SCORES_OVER * len(images)).values
    for head in net.conf:
        getattr(head, "norm", head).bias[:: net.num_classes] += most[-1]


# ---------------------------------------------------------------- routes


class Plain(Predictor):
    """The stages of a straightforward program, with the detections of ``Predictor``."""

    def __init__(self, network: Network, amp: str) -> None:
        vars(self).update(vars(network.predictor))
        self.net, self.amp = network.net, amp

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor:
        pixels = self.stack(images).to(self.device).float().contiguous()
        return pixels - MEAN.to(self.device)

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        with autocast(self.device, self.amp):
            return super().forward(batch)

    @torch.inference_mode()
    def postprocess(self, outputs: dict[str, Tensor],
                    sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        found = plain_detections(self.detect, outputs["loc"], outputs["conf"], self.priors, sizes)
        return [{key: value.cpu() for key, value in each.items()} for each in found]


class Graphed:
    """A network in a CUDA graph, captured with the first batch.

    Batches must have one shape. The next call overwrites the outputs.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net, self.graph = net, None

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.graph is None:
            self.images = images.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # algorithms are chosen, kernels compiled
                    self.net(self.images)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.outputs = self.net(self.images)
            self.graph = graph
        self.images.copy_(images)
        self.graph.replay()
        return self.outputs


def compiled(net: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Compile by TorchInductor, on a GPU into CUDA graphs. Call it within `compilations`.

    What does not fit into one graph is an error, else it would silently run in eager mode.
    """
    mode = "reduce-overhead" if next(net.parameters()).is_cuda else None
    return torch.compile(net, mode=mode, fullgraph=True, dynamic=False)


@contextmanager
def compilations(device: torch.device) -> Iterator[None]:
    """Compile anew within the block: generated code contains the number of threads.

    On a CPU weights are frozen, and can then be packed. Freezing is no option of ``torch.compile``,
    as tracing must know of it, too. All networks share one limit, since they share a class.
    """
    torch.compiler.reset()
    with (torch._dynamo.config.patch(cache_size_limit=256),
          torch._inductor.config.patch(freezing=device.type == "cpu")):
        yield


WAYS: dict[str, tuple[Callable[[nn.Module], Callable], bool]] = {
    "deployed": (lambda net: net, False), "compiled": (compiled, False), "graph": (Graphed, False),
    "gather": (lambda net: net, True), "gather_graph": (Graphed, True)}
"""Routes beside "plain": how a deployed network is wrapped, and whether its HarD blocks gather."""


@dataclass
class Route:
    """A way from image files to boxes, and its measurements."""

    network: Network
    name: str
    precision: str
    predictor: Predictor
    row: dict = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)  # seconds of every round, by stage

    def run(self, files: Sequence[Path]) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
        """Return the seconds of each stage and of all, and the detections."""
        predictor, seconds, found = self.predictor, Counter(), []
        stage = partial(self._stage, seconds)
        images = stage("decode", lambda: [read_image(file) for file in files])
        for group in predictor.batches(images):
            batch = stage("preprocess", predictor.preprocess, group)
            outputs = stage("forward", predictor.forward, batch)
            sizes = [(image.shape[1], image.shape[0]) for image in group]
            found += stage("postprocess", predictor.postprocess, outputs, sizes)
        return {**seconds, "total": seconds.total()}, found

    def forward(self, batch: Tensor) -> dict[str, float]:
        seconds: Counter[str] = Counter()
        self._stage(seconds, "forward", self.predictor.forward, batch)
        return seconds

    def _stage(self, seconds: Counter[str], name: str, call: Callable,
               *arguments: object) -> object:
        """Return the result of a call, and add its time to that of its stage."""
        set_tf32(self.precision)
        start = now(self.predictor.device)
        result = call(*arguments)
        seconds[name] += now(self.predictor.device) - start
        return result


def routes_of(network: Network, names: Sequence[str], amps: Sequence[str],
              exported: Sequence[Path] = ()) -> Iterator[Route]:
    """Yield the routes of a network. On a CPU plain is the baseline, in float32 only.

    Raises UserError: a file was not exported from this network.
    """
    device = network.predictor.device
    for name, amp in product(names, amps):
        mode = "off" if amp == "tf32" else amp
        if name != "plain":
            predictor, (wrap, gather) = copy.copy(network.predictor), WAYS[name]
            predictor.net = wrap(deploy(network.net, gather).to(device, AMP_TYPES[mode]))
        elif device.type == "cpu" and amp != "off":
            continue
        else:
            predictor = Plain(network, mode)
        yield Route(network, name, PRECISIONS[amp], predictor)
    for file in exported:
        predictor = Predictor(file, threads=torch.get_num_threads())
        info = predictor.exported.info
        if info.checkpoint["sha256"] != sha256_of(network.file):
            raise UserError(f"{file} was made of another {info.checkpoint['file']} than the "
                            f"--checkpoint {network.file}; export that one")
        yield Route(network, file.name, info.precision, predictor)
