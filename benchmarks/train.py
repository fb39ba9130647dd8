"""Loss, training step and memory of training, beside the published and the plain way.

    python -m benchmarks.train loss [--size 512] [--batch 32] [--classes 81] [--amp off bf16]
    python -m benchmarks.train step [--root FOLDER] [--version SSD_HarDNet68 ...] [--size 300]
        [--batch 16] [--rounds 40] [--amp bf16] [--compile]
    python -m benchmarks.train memory [--version SSD_HarDNet68 ...] [--size 512] [--amp off bf16]
        [--device cuda] [--json OUT]

`loss` claims: matching and loss, forward and backward, take at most a quarter of the published
routine's time, with equal losses and gradients. The published one matches image by image and box by
box, ranks by sorting twice and selects by masks of the size of the predictions. 1 to 20 random
boxes an image; the predictions are random.

`step` compares `train_test.py`'s training step with the plain one: float32, channels first, the
published loss. Both start from the same weights and get the same batches and learning rates. A
third, plain in channels-last memory, shows what rounding alone does to the losses. --root is in VOC
layout; without it images are drawn (demo.shapes).

`memory` claims (arXiv 1707.06990): recomputed concatenations save memory, with gradients equal bit
by bit. "kept" is what lies in memory between forward and backward pass, MiB an image. "peak" is the
largest memory of a whole step: of all tensors on a GPU, of a process on the CPU.
"""

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import harness
from benchmarks.harness import Rows, now, options, program, race, run
from data.config import INPUT_MEAN, PRIORS
from data.loading import EpochSampler, TrainingSet, training_loader
from data.transforms import SSDAugmentation
from data.voc0712 import VOCDetection
from demo.shapes import make_dataset
from engine.steps import Batch, TrainStep
from layers import MultiBoxLoss, PriorBox
from layers.boxes import encode, iou, to_corners
from models import BACKBONES, build_net, prior_config
from utils.arguments import number, positive
from utils.device import AMP_TYPES, autocast, to_input
from utils.errors import command

VARIANCE = (0.1, 0.2)
CLASSES = 81
WARM_UP = 2  # steps that are not timed
TARGET = torch.tensor([[0.1, 0.2, 0.5, 0.6, 1.0], [0.4, 0.4, 0.9, 0.8, 2.0]])


# ---------------------------------------------------------------- loss


class PublishedLoss(MultiBoxLoss):
    """The published matching and loss, written from its description; every image needs a box."""

    @torch.no_grad()
    def match(self, targets: Sequence[Tensor], priors: Tensor) -> tuple[Tensor, Tensor]:
        found = [self._match_one(target.to(priors.device), priors) for target in targets]
        labels, offsets = zip(*found, strict=True)
        return torch.stack(labels), torch.stack(offsets)

    def loss(self, outputs: tuple[Tensor, Tensor], labels: Tensor, offsets: Tensor,
             count: Tensor | int) -> tuple[Tensor, Tensor]:
        loc, conf = (x.float() for x in outputs)
        positive = labels > 0
        mask = positive.unsqueeze(2).expand_as(loc)
        given, wanted = (x[mask].view(-1, 4) for x in (loc, offsets))
        loss_loc = F.smooth_l1_loss(given, wanted, reduction="sum")
        rows = conf.view(-1, conf.shape[2])
        mining = rows.logsumexp(1, keepdim=True) - rows.gather(1, labels.view(-1, 1))
        mining = mining.view_as(labels).masked_fill(positive, 0)
        rank = mining.sort(1, descending=True).indices.sort(1).indices
        negatives = (3 * positive.sum(1, keepdim=True)).clamp(max=labels.shape[1] - 1)
        chosen = positive | (rank < negatives)
        picked = conf[chosen.unsqueeze(2).expand_as(conf)].view(-1, conf.shape[2])
        loss_conf = F.cross_entropy(picked, labels[chosen], reduction="sum")
        return loss_loc / count, loss_conf / count

    def _match_one(self, target: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
        overlaps = iou(target[:, :4], to_corners(priors))
        best_prior = overlaps.max(1).indices
        best_overlap, best_box = overlaps.max(0)
        best_overlap.index_fill_(0, best_prior, 2)
        for j in range(len(best_prior)):
            best_box[best_prior[j]] = j
        labels = target[best_box, 4].long()
        labels[best_overlap < 0.5] = 0
        return labels, encode(target[best_box, :4], priors, VARIANCE)


def make_targets(batch: int, classes: int) -> list[Tensor]:
    """Return 1 to 20 random boxes and labels an image."""
    generator, targets = torch.Generator().manual_seed(0), []
    for _ in range(batch):
        count = int(torch.randint(1, 21, (1,), generator=generator))
        centres = torch.rand(count, 2, generator=generator)
        sides = 0.02 + 0.4 * torch.rand(count, 2, generator=generator)
        corners = to_corners(torch.cat([centres, sides], 1)).clamp(0, 1)
        labels = torch.randint(1, classes, (count, 1), generator=generator)
        targets.append(torch.cat([corners, labels], 1))
    return targets


def with_gradients(criterion: Callable, outputs: list[Tensor], priors: Tensor,
                   targets: list[Tensor]) -> list[Tensor]:
    losses = criterion(outputs, priors, targets)
    return [*losses, *torch.autograd.grad(sum(losses), outputs)]


def loss(args: argparse.Namespace, device: torch.device) -> Rows:
    priors = PriorBox(PRIORS["COCO", args.size]).to(device)()
    targets = make_targets(args.batch, args.classes)
    criteria = {"ours": MultiBoxLoss(args.classes), "published": PublishedLoss(args.classes)}
    for amp in args.amp:
        generator = torch.Generator().manual_seed(1)
        outputs = [torch.randn(args.batch, len(priors), width, generator=generator)
                   .to(device, AMP_TYPES[amp] or torch.float32).requires_grad_()
                   for width in (4, args.classes)]
        rest = outputs, priors, targets
        calls = {name: partial(with_gradients, each, *rest) for name, each in criteria.items()}
        times, results = race(calls, args.rounds, device)
        torch.testing.assert_close(results["ours"], results["published"])
        yield {"amp": amp, "size": args.size, "batch": args.batch, "classes": args.classes,
               "seconds": times, "ratio": times["ours"] / times["published"]}


# ---------------------------------------------------------------- step


class ChannelsFirst(nn.Module):
    """A network in PyTorch's default memory layout, whatever that of the images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.to(memory_format=torch.contiguous_format)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(images.contiguous())


def lanes_of(net: nn.Module, priors: Tensor, amp: str, compiled: bool) -> dict[str, TrainStep]:
    """Return the training steps to compare, each of a copy of ``net``."""
    first = ChannelsFirst(copy.deepcopy(net))
    ours, last = (copy.deepcopy(net).to(memory_format=torch.channels_last) for _ in range(2))
    parts = {"plain": (first, PublishedLoss, "off"),
             "ours": (torch.compile(ours) if compiled else ours, MultiBoxLoss, amp),
             "rounding": (last, PublishedLoss, "off")}
    lanes = {}
    for name, (lane, criterion, precision) in parts.items():
        optimizer = torch.optim.SGD(lane.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
        lanes[name] = TrainStep(lane, criterion(net.num_classes), priors, optimizer, amp=precision)
    return lanes


def batches_of(root: Path | None, size: int, batch: int, steps: int) -> tuple[list[Batch], int]:
    """Return augmented batches, made beforehand, and the number of classes with background."""
    with tempfile.TemporaryDirectory() as folder:
        if root is None:
            root = Path(folder) / "shapes"
            make_dataset(root, 200, 1)
        dataset = VOCDetection(root, [(None, "trainval")])
        # The published routine fails on an image without boxes.
        dataset.keep_first(sum(len(dataset.target(i)) > 0 for i in range(len(dataset))))
        samples = TrainingSet(dataset, SSDAugmentation(size, INPUT_MEAN), seed=0)
        sampler = EpochSampler(len(dataset), batch, seed=0)
        loader = training_loader(samples, sampler, workers=0, pin_memory=False)
        found: list[Batch] = []
        for epoch in range(-(-steps // sampler.steps)):
            sampler.set_epoch(epoch, 0)
            found += list(loader)
    return found[:steps], len(dataset.classes) + 1


def means(values: Sequence[float], count: int = 10) -> list[float]:
    return [statistics.mean(values[i : i + count]) for i in range(0, len(values), count)]


def step(args: argparse.Namespace, device: torch.device) -> Rows:
    steps = WARM_UP + args.rounds
    batches, num_classes = batches_of(args.root, args.size, args.batch, steps)
    for version in args.version:
        torch.manual_seed(0)
        net = build_net(version, args.size, num_classes).to(device)
        priors = PriorBox(prior_config(version, "VOC", args.size)).to(device)()
        lanes = lanes_of(net, priors, args.amp, args.compile)
        losses: dict[str, list[float]] = {name: [] for name in lanes}
        seconds: dict[str, list[float]] = {name: [] for name in lanes}
        for k, batch in enumerate(batches):
            rate = args.lr * min(1, (k + 1) / (steps / 4))  # rises over a quarter of the steps
            for name, lane in lanes.items():
                start = now(device)
                losses[name].append(sum(lane([batch], rate).results()[:2]))
                seconds[name].append(now(device) - start)
        median = {name: statistics.median(values[WARM_UP:]) for name, values in seconds.items()}
        yield {"network": version, "size": args.size, "batch": args.batch, "amp": args.amp,
               "compiled": args.compile,
               "images a second": {name: args.batch / each for name, each in median.items()},
               "times faster": median["plain"] / median["ours"],
               "losses": {name: means(values) for name, values in losses.items()}}


# ---------------------------------------------------------------- memory


class Allocations(TorchDispatchMode):
    """Record the tensors that operations make, to count those that still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in given:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def nbytes(self) -> int:
        return sum(size for storage, size in self.made.values() if not storage.expired())


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def kept(net: nn.Module, images: Tensor, amp: str) -> int:
    """Return the bytes that a forward pass leaves for the backward pass, outputs included."""
    with Allocations() as allocations, autocast(images.device, amp):
        outputs = net(images)
    size = allocations.nbytes()
    del outputs
    return size


def gradients(net: nn.Module, images: Tensor, priors: Tensor, amp: str,
              recompute: bool) -> tuple[Tensor, ...]:
    net.recompute = recompute
    with autocast(images.device, amp):
        outputs = net(images)
    losses = MultiBoxLoss(net.num_classes)(outputs, priors, [TARGET] * len(images))
    return torch.autograd.grad(sum(losses), list(net.parameters()))


def build(version: str, size: int, batch: int,
          device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """Return (network, images, priors), the same for the same arguments."""
    torch.manual_seed(0)
    net = build_net(version, size, CLASSES).to(device, memory_format=torch.channels_last).train()
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    priors = PriorBox(prior_config(version, "COCO", size)).to(device)()
    return net, to_input(pixels, INPUT_MEAN, device), priors


def peak_rss(version: str, size: int, batch: int, amp: str, recompute: bool, threads: int) -> float:
    """Return the largest memory in MiB of this process, a new one, after one step (on Linux)."""
    torch.set_num_threads(threads)
    net, images, priors = build(version, size, batch, torch.device("cpu"))
    gradients(net, images, priors, amp, recompute)
    # getrusage would begin with the memory of the process that started this one.
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def peak(call: Callable[[], object], device: torch.device, *arguments: object) -> float:
    """Return the largest MiB of a step: of CUDA tensors by ``call``, else by ``peak_rss``."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() / 2**20
    return harness.in_a_process(peak_rss, *arguments, torch.get_num_threads())


def memory(args: argparse.Namespace, device: torch.device) -> Rows:
    if device.type == "cuda":  # or equal steps differ in their last bits
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    modes = {"plain": False, "recomputed": True}
    for version, amp in product(args.version, args.amp):
        net, images, priors = build(version, args.size, 2 * args.batch, device)
        half, more = images[: args.batch], {}
        for mode, net.recompute in modes.items():
            more[mode] = (kept(net, images, amp) - kept(net, half, amp)) / args.batch / 2**20
        rest = net, half.clone(memory_format=torch.preserve_format), priors, amp
        calls = {mode: partial(gradients, *rest, recompute) for mode, recompute in modes.items()}
        times, results = race(calls, args.rounds, device, warm_up=1)
        if not all(map(torch.equal, results["plain"], results["recomputed"])):
            raise AssertionError(f"{version} {amp}: recomputation gives other gradients")
        results.clear()
        step = version, args.size, args.batch, amp
        peaks = {mode: peak(call, device, *step, modes[mode]) for mode, call in calls.items()}
        yield {"network": version, "size": args.size, "batch": args.batch, "amp": amp, "kept": more,
               "peak": peaks, "seconds": times, "ratio": times["recomputed"] / times["plain"]}


def parser() -> argparse.ArgumentParser:
    p = program("train", __doc__)
    commands = p.add_subparsers(required=True, metavar="COMMAND")
    q = commands.add_parser("loss", parents=[options(loss, 15)], help="matching and loss")
    q.add_argument("--classes", type=positive, default=81)
    q.add_argument("--size", type=int, choices=(300, 512), default=512)
    q.add_argument("--batch", type=positive, default=32)
    q.add_argument("--amp", choices=AMP_TYPES, nargs="+", default=["off", "bf16"])
    q = commands.add_parser("step", parents=[options(step, 40)], help="a whole training step")
    q.add_argument("--root", type=Path, help="data in VOC layout (drawn)")
    q.add_argument("--version", choices=BACKBONES, nargs="+", default=["SSD_HarDNet68"])
    q.add_argument("--size", type=int, choices=(300, 512), default=300)
    q.add_argument("--batch", type=positive, default=16)
    q.add_argument("--lr", type=number, default=1e-3)
    q.add_argument("--amp", choices=AMP_TYPES, default="bf16")
    q.add_argument("--compile", action="store_true")
    q = commands.add_parser("memory", parents=[options(memory, 5)], help="memory of training")
    networks = ["SSD_HarDNet68", "SSD_HarDNet85", "SSD_vgg"]
    q.add_argument("--version", choices=BACKBONES, nargs="+", default=networks)
    q.add_argument("--size", type=int, choices=(300, 512), default=512)
    q.add_argument("--batch", type=positive, default=1)
    q.add_argument("--amp", choices=AMP_TYPES, nargs="+", default=["off", "bf16"])
    return p


main = command(partial(run, parser))

if __name__ == "__main__":
    raise SystemExit(main())
