"""From network outputs to detections: beside the plain way, and beside the network's forward pass.

    python -m benchmarks.detect [--device cuda] [--batch 1] [--json OUT]

The claims, for SSD512 with COCO's 80 classes: where 140,000 scores of a picture are over the
threshold, as a network in its first epochs has them, Detect is at least 10 times faster than
softmax, full decoding and a loop over the classes with torchvision.ops.nms; where a few hundred
are, as of a trained network, it takes at most 5 % of SSD512-HarDNet68's forward pass. The outputs
are made up, and both ways must find the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.speed import plain_detections
from benchmarks.timing import machine, medians, write
from data.config import COCO_512
from layers import Detect, PriorBox
from layers.boxes import iou, to_corners
from models import build_net
from utils.device import AMP_TYPES, autocast
from utils.nms import backend

CLASSES = 81
SIZE = (640, 480)


def crowded(priors: Tensor, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(loc, conf) with 140,000 scores over 0.02 a picture: noise, and a shifted background."""
    loc = torch.randn(batch, len(priors), 4, generator=generator) / 2
    conf = torch.randn(batch, len(priors), CLASSES, generator=generator) * 2
    conf[..., 0] += 6.72
    return loc, conf


def trained(priors: Tensor, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(loc, conf) with a few hundred scores over 0.02 a picture: those of priors on 7 objects."""
    loc = torch.randn(batch, len(priors), 4, generator=generator) / 4
    conf = torch.randn(batch, len(priors), CLASSES, generator=generator)
    conf[..., 0] += 12
    corners = to_corners(priors)
    for scores in conf:
        centre, side = (torch.rand(7, 2, generator=generator) for _ in range(2))
        overlap = iou(to_corners(torch.cat([centre, 0.1 + 0.4 * side], 1)), corners)
        labels = torch.randint(1, CLASSES, (7,), generator=generator)
        for label, row in zip(labels, overlap, strict=True):
            scores[row > 0.35, label] += 12 + 20 * (row[row > 0.35] - 0.35)
            scores[row > 0.35, label % 80 + 1] += 11  # what it is mistaken for
    return loc, conf


def plain(detect: Detect, loc: Tensor, conf: Tensor, priors: Tensor) -> list[dict[str, Tensor]]:
    return plain_detections(detect, loc, conf, priors, [SIZE] * len(loc))


def check(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        if not torch.equal(a["labels"], b["labels"]):
            raise AssertionError("other labels are found")
        for key in ("boxes", "scores"):
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-3)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cpu")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--version", default="SSD_HarDNet68", help="network of the forward pass")
    p.add_argument("--amp", choices=AMP_TYPES, nargs="+", default=["off", "bf16"])
    p.add_argument("--rounds", type=int, default=10)
    p.add_argument("--json", type=Path)
    args = p.parse_args(argv)
    device = torch.device(args.device)
    priors = PriorBox(COCO_512)()
    net = build_net(args.version, 512, CLASSES).eval()
    net.to(device, memory_format=torch.channels_last)
    images = torch.rand(args.batch, 3, 512, 512, device=device) * 255 - 110
    images = images.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(amp: str) -> None:
        with autocast(device, amp):
            net(images)

    print(f"{machine(device)}; batch {args.batch}; suppression: {backend(device.type)}")
    rows = {}
    for make in (crowded, trained):
        loc, conf = (x.to(device) for x in make(priors, args.batch, torch.manual_seed(0)))
        on_device, detect = priors.to(device), Detect()
        over = int((conf.softmax(2)[..., 1:] > detect.config.conf_thresh).sum()) // args.batch

        def ours(loc=loc, conf=conf, priors=on_device, detect=detect) -> list[dict[str, Tensor]]:
            return detect(loc, conf, priors, [SIZE] * args.batch)

        def theirs(loc=loc, conf=conf, priors=on_device, detect=detect) -> list[dict[str, Tensor]]:
            return plain(detect, loc, conf, priors)

        check(ours(), theirs())
        calls = {"Detect": ours, "plain": theirs}
        if make is trained:
            calls |= {f"forward {amp}": lambda amp=amp: forward(amp) for amp in args.amp}
        times = medians(calls, args.rounds, device)
        print(f"{make.__name__}: {over:,} scores over {detect.config.conf_thresh} a picture")
        for name, seconds in times.items():
            ratio = f"x{seconds / times['Detect']:.1f}"
            if name.startswith("forward"):
                ratio = f"Detect takes {times['Detect'] / seconds:.2%} of it"
            print(f"  {name:13} {seconds * 1e3:9.2f} ms   {ratio}", flush=True)
        rows[make.__name__] = {"scores_over": over, "seconds": times}
    write(args.json, device, rows=rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
