"""Training-step time of each network, as ratios to SSD_vgg in the same run.

    python -m benchmarks.network [--device cuda] [--size 512] [--batch 1 32] [--json OUT]

Networks take turns within every round, so that a disturbance meets all of them; times are medians.
That of a forward pass is ``benchmarks.speed``'s.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.timing import machine, medians, write
from engine.steps import TrainStep
from layers import MultiBoxLoss, PriorBox
from models import BACKBONES, build_net, prior_config


def training_call(net, images, priors, amp: str) -> Callable[[], None]:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9)
    train_step = TrainStep(net, MultiBoxLoss(net.num_classes), priors, optimizer, amp=amp)
    target = torch.tensor([[0.1, 0.2, 0.5, 0.6, 1.0], [0.4, 0.4, 0.9, 0.8, 2.0]])
    batch = (images, [target] * len(images), list(range(len(images))))

    def call() -> None:
        train_step([batch], 1e-6)

    return call


def measure(device: torch.device, size: int, batch: int, amp: str, rounds: int) -> dict[str, float]:
    """Median seconds of one step of each network that exists at ``size``."""
    calls = {}
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    for version, row in BACKBONES.items():
        if size not in row.sizes:
            continue
        net = build_net(version, size, 81).to(device, memory_format=torch.channels_last)
        priors = PriorBox(prior_config(version, "COCO", size)).to(device)()
        calls[version] = training_call(net, pixels.to(device), priors, amp)
    return medians(calls, rounds, device)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--size", type=int, nargs="+", default=[300, 512])
    p.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    p.add_argument("--amp", nargs="+", default=["off", "bf16"])
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument("--json", type=Path)
    args = p.parse_args(argv)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    rows = []
    print(machine(device))
    print("size batch amp   " + "".join(f"{v:>26}" for v in BACKBONES))
    for size in args.size:
        for batch in args.batch:
            for amp in args.amp:
                times = measure(device, size, batch, amp, args.rounds)
                shown = "".join(
                    f"{batch / times[v]:>12.1f} img/s  x{times['SSD_vgg'] / times[v]:.2f}"
                    if v in times
                    else f"{'-':>26}"
                    for v in BACKBONES
                )
                print(f"{size:4} {batch:5} {amp:5} {shown}", flush=True)
                rows.append({"size": size, "batch": batch, "amp": amp, "seconds": times})
    write(args.json, device, rows=rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
