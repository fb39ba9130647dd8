"""A training step beside the plain one, on the same pictures and from the same weights.

    python -m benchmarks.step [--root FOLDER] [--version SSD_HarDNet68] [--size 300] [--batch 16]
                              [--steps 40] [--amp bf16] [--compile] [--device cpu] [--json OUT]

Plain: float32, channels first, and the published loss. Ours: what `train_test.py --amp bf16` does,
channels last and the project's loss. Both take the same augmented batches and learning rates, a
step each in turn; times are medians, losses the means of ten steps. A third, plain float32 in
channels last, is not timed: how far its losses are from the plain ones is what rounding alone does.
FOLDER is in VOC layout; without it pictures are drawn (demo.shapes).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.loss import published
from benchmarks.timing import machine, write
from data.config import INPUT_MEAN
from data.loading import EpochSampler, TrainingSet, training_loader
from data.transforms import SSDAugmentation
from data.voc0712 import VOCDetection
from demo.shapes import make_dataset
from engine.steps import TrainStep
from layers import MultiBoxLoss, PriorBox
from models import BACKBONES, build_net, prior_config
from utils.device import AMP_TYPES, to_input

WARM_UP = 2  # steps that are not timed: caches fill, algorithms are chosen
MEAN_OF = 10


def plain_lane(net, priors: torch.Tensor, rates: Callable[[int], float], layout):
    """step(number, batch) -> loss, in float32 with the published loss."""
    net = net.to(memory_format=layout)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)

    def step(number: int, batch) -> float:
        images, targets, _ = batch
        for group in optimizer.param_groups:
            group["lr"] = rates(number)
        inputs = to_input(images, INPUT_MEAN, priors.device).contiguous(memory_format=layout)
        loss = sum(published(*net(inputs), priors, targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def our_lane(net, priors: torch.Tensor, rates: Callable[[int], float], amp: str, compiled: bool):
    """step(number, batch) -> loss, as a run of train_test.py makes it."""
    net = net.to(memory_format=torch.channels_last)
    forward = torch.compile(net) if compiled else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
    train_step = TrainStep(forward, MultiBoxLoss(net.num_classes), priors, optimizer, amp=amp)

    def step(number: int, batch) -> float:
        done = train_step([batch], rates(number))
        loss_loc, loss_conf, _ = done.results()
        return loss_loc + loss_conf

    return step


def batches_of(root: Path | None, size: int, batch: int, steps: int) -> tuple[list, int]:
    """Augmented batches of a training, made beforehand, and the number of classes."""
    with tempfile.TemporaryDirectory() as folder:
        if root is None:
            root = Path(folder) / "shapes"
            make_dataset(root, 200, 1)
        dataset = VOCDetection(root, [(None, "trainval")])
        # The published routine stops at a picture without boxes.
        dataset.keep_first(sum(len(dataset.target(i)) > 0 for i in range(len(dataset))))
        samples = TrainingSet(dataset, SSDAugmentation(size, INPUT_MEAN), seed=0)
        sampler = EpochSampler(len(dataset), batch, seed=0)
        loader = training_loader(samples, sampler, workers=0, pin_memory=False)
        found: list = []
        for epoch in range(-(-steps // sampler.steps)):
            sampler.set_epoch(epoch, 0)
            found += list(loader)
    return found[:steps], len(dataset.classes) + 1


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--root", type=Path, help="data in VOC layout (default: drawn)")
    p.add_argument("--version", choices=BACKBONES, default="SSD_HarDNet68")
    p.add_argument("--size", type=int, default=300)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--amp", choices=AMP_TYPES, default="bf16")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", type=Path)
    args = p.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as train_test.py does
    batches, num_classes = batches_of(args.root, args.size, args.batch, args.steps)

    def rates(number: int) -> float:
        return args.lr * min(1, (number + 1) / (args.steps / 4))  # warm-up over a quarter

    torch.manual_seed(0)
    net = build_net(args.version, args.size, num_classes).to(device)
    priors = PriorBox(prior_config(args.version, "VOC", args.size)).to(device)()
    lanes = {
        "plain": plain_lane(copy.deepcopy(net).train(), priors, rates, torch.contiguous_format),
        "ours": our_lane(copy.deepcopy(net), priors, rates, args.amp, args.compile),
        "rounding": plain_lane(copy.deepcopy(net).train(), priors, rates, torch.channels_last),
    }
    losses: dict[str, list[float]] = {name: [] for name in lanes}
    seconds: dict[str, list[float]] = {name: [] for name in lanes}
    print(machine(device))
    for number, batch in enumerate(batches):
        for name, step in lanes.items():
            start = time.perf_counter()
            losses[name].append(step(number, batch))  # reads the loss, so the step has ended
            seconds[name].append(time.perf_counter() - start)
        if (number + 1) % MEAN_OF == 0:
            means = {name: np.mean(values[-MEAN_OF:]) for name, values in losses.items()}
            shown = "  ".join(f"{name} {mean:8.4f}" for name, mean in means.items())
            print(f"loss of steps {number + 2 - MEAN_OF:3}-{number + 1:3}:  {shown}", flush=True)
    median = {name: statistics.median(values[WARM_UP:]) for name, values in seconds.items()}
    ratio = median["plain"] / median["ours"]
    how = f"{args.amp}{', compiled' if args.compile else ''}"
    print(
        f"{args.version} {args.size}, batch {args.batch}: plain {args.batch / median['plain']:.2f} "
        f"img/s, ours ({how}) {args.batch / median['ours']:.2f} img/s, {ratio:.2f} times"
    )
    write(args.json, device, ratio=ratio, seconds=median, losses=losses, options=vars(args) | {
        "root": str(args.root), "json": None})  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
