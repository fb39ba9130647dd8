"""Loss, training step and memory of training, beside the published and the plain way.

    python -m benchmarks.train {loss,step,memory} [--version SSD_HarDNet68 ...] [--size 512]

All images and boxes are random, 1 to 20 boxes an image.

`loss` claims: matching and loss, forward and backward, take at most a quarter of the published
routine's time, with equal losses and gradients. The published one matches image by image and box by
box, ranks by sorting twice and selects by masks of the size of the predictions.

`step` compares `train_test.py`'s training step with the plain one: float32, channels first, the
published loss. Both start from the same weights and get the same batches; their losses are shown.

`memory` claims (arXiv 1707.06990): recomputed concatenations save memory, with gradients equal bit
by bit. "kept" is what lies in memory between forward and backward pass, MiB an image.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.nn import functional as F

from benchmarks.harness import CLASSES, Rows, new_net, options, program, race, random_images, run
from data.config import INPUT_MEAN, PRIORS
from engine.steps import Batch, TrainStep
from layers import MultiBoxLoss, PriorBox
from layers.boxes import encode, iou, to_corners
from models import BACKBONES
from utils.arguments import positive
from utils.device import AMP_TYPES, autocast, to_input
from utils.errors import command

VARIANCE = (0.1, 0.2)
RATE = 1e-4  # of learning


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


def make_targets(batch: int) -> list[Tensor]:
    """Return 1 to 20 random boxes and labels an image."""
    rng, targets = np.random.default_rng(0), []
    for count in rng.integers(1, 21, batch):
        boxes = np.hstack([rng.random((count, 2)), rng.uniform(0.02, 0.42, (count, 2))])
        corners = to_corners(torch.from_numpy(boxes)).clamp(0, 1)
        labels = torch.from_numpy(rng.integers(1, CLASSES, (count, 1)))
        targets.append(torch.cat([corners, labels], 1).float())
    return targets


def with_gradients(criterion: Callable, outputs: list[Tensor], priors: Tensor,
                   targets: list[Tensor]) -> list[Tensor]:
    losses = criterion(outputs, priors, targets)
    return [*losses, *torch.autograd.grad(sum(losses), outputs)]


def loss(args: argparse.Namespace, device: torch.device) -> Rows:
    priors = PriorBox(PRIORS["COCO", args.size]).to(device)()
    targets = make_targets(args.batch)
    criteria = {"ours": MultiBoxLoss(CLASSES), "published": PublishedLoss(CLASSES)}
    for amp in args.amp:
        generator = torch.Generator().manual_seed(1)
        outputs = [torch.randn(args.batch, len(priors), width, generator=generator)
                   .to(device, AMP_TYPES[amp] or torch.float32).requires_grad_()
                   for width in (4, CLASSES)]
        rest = outputs, priors, targets
        calls = {name: partial(with_gradients, each, *rest) for name, each in criteria.items()}
        times, results = race(calls, args.rounds, device)
        torch.testing.assert_close(results["ours"], results["published"])
        yield {"amp": amp, "size": args.size, "batch": args.batch,
               "seconds": times, "ratio": times["ours"] / times["published"]}


# ---------------------------------------------------------------- step


def channels_first(net: nn.Module, images: tuple[Tensor]) -> tuple[Tensor]:
    """Convert the input of a network to PyTorch's default memory layout."""
    return (images[0].contiguous(),)


def take_step(lane: TrainStep, batch: Batch) -> float:
    """Make a step and return its loss."""
    return sum(lane([batch], RATE).results()[:2])


def step(args: argparse.Namespace, device: torch.device) -> Rows:
    indices = [*range(args.batch)]
    batch = random_images(args.batch, args.size), make_targets(args.batch), indices
    for version, amp in product(args.version, args.amp):
        net, priors = new_net(version, args.size, device)
        first = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
        first.register_forward_pre_hook(channels_first)
        ours = torch.compile(net) if args.compile else net
        ways = {"plain": (first, PublishedLoss, "off"), "ours": (ours, MultiBoxLoss, amp)}
        calls = {}
        for name, (lane, criterion, precision) in ways.items():
            optimizer = torch.optim.SGD(lane.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
            lane = TrainStep(lane, criterion(CLASSES), priors, optimizer, amp=precision)
            calls[name] = partial(take_step, lane, batch)
        times, losses = race(calls, args.rounds, device)
        yield {"network": version, "size": args.size, "batch": args.batch, "amp": amp,
               "compiled": args.compile, "seconds": times,
               "images a second": {name: args.batch / each for name, each in times.items()},
               "times faster": times["plain"] / times["ours"], "last losses": losses}


# ---------------------------------------------------------------- memory


def allocated(memory: profile) -> int:
    """Return the bytes of the tensors that were made within a profile and still exist."""
    return sum(event.self_cpu_memory_usage + event.self_device_memory_usage
               for event in memory.function_events)


def kept(net: nn.Module, images: Tensor, amp: str) -> int:
    """Return the bytes that a forward pass leaves for the backward pass, outputs included."""
    with profile(profile_memory=True) as memory, autocast(images.device, amp):
        outputs = net(images)  # noqa: F841 lives until all is counted
    return allocated(memory)


def gradients(net: nn.Module, images: Tensor, priors: Tensor, amp: str,
              recompute: bool) -> tuple[Tensor, ...]:
    net.recompute = recompute
    with autocast(images.device, amp):
        outputs = net(images)
    losses = MultiBoxLoss(CLASSES)(outputs, priors, make_targets(len(images)))
    return torch.autograd.grad(sum(losses), list(net.parameters()))


def memory(args: argparse.Namespace, device: torch.device) -> Rows:
    if device.type == "cuda":  # or equal steps differ in their last bits
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    modes = {"plain": False, "recomputed": True}
    for version, amp in product(args.version, args.amp):
        net, priors = new_net(version, args.size, device)
        images = to_input(random_images(2 * args.batch, args.size), INPUT_MEAN, device)
        half, more = images[: args.batch], {}
        for mode, net.recompute in modes.items():
            more[mode] = (kept(net, images, amp) - kept(net, half, amp)) / args.batch / 2**20
        rest = net, half.clone(memory_format=torch.preserve_format), priors, amp
        calls = {mode: partial(gradients, *rest, recompute) for mode, recompute in modes.items()}
        times, results = race(calls, args.rounds, device, warm_up=1)
        if not all(map(torch.equal, results["plain"], results["recomputed"])):
            raise AssertionError(f"{version} {amp}: recomputation gives other gradients")
        yield {"network": version, "size": args.size, "batch": args.batch, "amp": amp, "kept": more,
               "seconds": times, "ratio": times["recomputed"] / times["plain"]}


def parser() -> argparse.ArgumentParser:
    p = program("train", __doc__)
    commands = p.add_subparsers(required=True, metavar="COMMAND")
    for rows, rounds, size, batch in (loss, 15, 512, 32), (step, 40, 300, 16), (memory, 5, 512, 1):
        q = commands.add_parser(rows.__name__, parents=[options(rows, rounds)])
        q.add_argument("--size", type=int, choices=(300, 512), default=size)
        q.add_argument("--batch", type=positive, default=batch)
        q.add_argument("--amp", choices=AMP_TYPES, nargs="+", default=["off", "bf16"])
        if rows is not loss:
            q.add_argument("--version", choices=BACKBONES, nargs="+", default=["SSD_HarDNet68"])
        if rows is step:
            q.add_argument("--compile", action="store_true")
    return p


main = command(partial(run, parser))

if __name__ == "__main__":
    raise SystemExit(main())
