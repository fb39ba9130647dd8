"""Matching and loss, forward and backward, as a ratio to the published routine in the same run.

    python -m benchmarks.loss [--device cuda] [--batch 32] [--size 512] [--classes 81] [--json OUT]

The claim: at most a quarter of the published routine's time. That one matches image by image and
box by box, records gradients of the logsumexp of all priors for the mining, ranks by sorting twice,
and picks what counts by masks of the size of the predictions; in half precision it works on a copy
in float32. Losses and gradients must be equal. 1 to 20 boxes an image, on which as many priors are
positive as random boxes get; predictions are random.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import machine, medians, write
from data.config import PRIORS
from layers import MultiBoxLoss, PriorBox
from layers.boxes import encode, to_corners
from utils.device import AMP_TYPES

VARIANCE = (0.1, 0.2)


def make_targets(batch: int, classes: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def image() -> Tensor:
        count = int(torch.randint(1, 21, (1,), generator=generator))
        centres = torch.rand(count, 2, generator=generator)
        sides = 0.02 + 0.4 * torch.rand(count, 2, generator=generator)
        corners = to_corners(torch.cat([centres, sides], 1)).clamp(0, 1)
        labels = torch.randint(1, classes, (count, 1), generator=generator)
        return torch.cat([corners, labels], 1)

    return [image() for _ in range(batch)]


def published_iou(a: Tensor, b: Tensor) -> Tensor:
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = (high - low).clamp(min=0).prod(2)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(1) for x in (a, b))
    return intersection / (area_a[:, None] + area_b[None] - intersection)


def published_match(target: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
    overlaps = published_iou(target[:, :4], to_corners(priors))
    best_prior = overlaps.max(1).indices
    best_overlap, best_box = overlaps.max(0)
    best_overlap.index_fill_(0, best_prior, 2)
    for j in range(len(best_prior)):
        best_box[best_prior[j]] = j
    labels = target[best_box, 4].long()
    labels[best_overlap < 0.5] = 0
    return labels, encode(target[best_box, :4], priors, VARIANCE)


def published(loc: Tensor, conf: Tensor, priors: Tensor, targets: list[Tensor]):
    """The losses of the published routine, written from its description."""
    loc, conf = loc.float(), conf.float()
    with torch.no_grad():
        found = [published_match(target.to(loc.device), priors) for target in targets]
        labels, offsets = (torch.stack(tensors) for tensors in zip(*found, strict=True))
    positive = labels > 0
    mask = positive.unsqueeze(2).expand_as(loc)
    loss_loc = F.smooth_l1_loss(loc[mask].view(-1, 4), offsets[mask].view(-1, 4), reduction="sum")

    rows = conf.view(-1, conf.shape[2])
    mining = rows.logsumexp(1, keepdim=True) - rows.gather(1, labels.view(-1, 1))
    mining = mining.view_as(labels).masked_fill(positive, 0)
    rank = mining.sort(1, descending=True).indices.sort(1).indices
    wanted = (3 * positive.sum(1, keepdim=True)).clamp(max=labels.shape[1] - 1)
    chosen = positive | (rank < wanted)
    mask = chosen.unsqueeze(2).expand_as(conf)
    picked = conf[mask].view(-1, conf.shape[2])
    loss_conf = F.cross_entropy(picked, labels[chosen], reduction="sum")
    count = positive.sum()
    return loss_loc / count, loss_conf / count


def with_gradients(losses: Callable[[], tuple[Tensor, Tensor]], inputs: list[Tensor]):
    loss_loc, loss_conf = losses()
    return [loss_loc, loss_conf, *torch.autograd.grad(loss_loc + loss_conf, inputs)]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--size", type=int, choices=sorted({s for _, s in PRIORS}), default=512)
    p.add_argument("--classes", type=int, default=81)
    p.add_argument("--amp", nargs="+", choices=AMP_TYPES, default=["off", "bf16"])
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--json", type=Path, help="a file, or - for the last line of the output")
    args = p.parse_args(argv)
    device = torch.device(args.device)
    priors = PriorBox(PRIORS["COCO", args.size]).to(device)()
    targets = make_targets(args.batch, args.classes)
    criterion = MultiBoxLoss(args.classes)
    print(f"{machine(device)}; batch {args.batch}, {args.size} px, {args.classes} classes")
    rows = []
    for amp in args.amp:
        generator = torch.Generator().manual_seed(1)
        inputs = [
            torch.randn(args.batch, len(priors), width, generator=generator)
            .to(device, AMP_TYPES[amp] or torch.float32)
            .requires_grad_()
            for width in (4, args.classes)
        ]
        calls = {
            "ours": partial(with_gradients, partial(criterion, inputs, priors, targets), inputs),
            "published": partial(
                with_gradients, partial(published, *inputs, priors, targets), inputs
            ),
        }
        torch.testing.assert_close(*(call() for call in calls.values()))
        times = medians(calls, args.rounds, device)
        ratio = times["ours"] / times["published"]
        print(
            f"{amp:4} ours {times['ours'] * 1e3:8.2f} ms, published "
            f"{times['published'] * 1e3:8.2f} ms, ratio {ratio:.3f} (x{1 / ratio:.1f})",
            flush=True,
        )
        rows.append({"amp": amp, "ratio": ratio, "seconds": times})
    content = {"batch": args.batch, "size": args.size, "classes": args.classes, "rows": rows}
    write(args.json, device, **content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
