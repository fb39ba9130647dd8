"""Non-maximum suppression beside torchvision's, and detection beside a loop over the classes.

    python -m benchmarks.nms suppress [--boxes 1000 10000] [--classes 1 20 80] [--batch 1]
    python -m benchmarks.nms detect [--batch 1] [--amp off bf16] [--device cuda] [--json OUT]

`suppress` claims: class-aware NMS of 10,000 boxes is at least 3 times faster than
`torchvision.ops.batched_nms`, both in the plain box convention. A CPU must keep torchvision's boxes
in torchvision's order, a GPU those that our routine keeps on the CPU. torchvision's GPU routine is
no reference: its compiler contracts products and sums, and up to 25,000 boxes it shifts each class
by the largest coordinate, which takes digits of float32 from the coordinates.

`detect` claims, for SSD512 with COCO's 80 classes: with 140,000 scores over the threshold, as in
the first epochs of training, `Detect` is at least 10 times faster than softmax, decoding of every
prior and a loop over the classes with `torchvision.ops.nms`; with a few hundred, as of a trained
network, it takes at most 5 % of SSD512-HarDNet68's forward pass. Both must find the same.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import CLASSES, Rows, options, program, race, run
from data.config import INPUT_MEAN
from layers import Detect
from layers.boxes import decode, iou, to_corners
from utils.arguments import positive
from utils.device import AMP_TYPES, autocast, to_input
from utils.errors import command
from utils.nms import backend, batched_nms

IOU = 0.45


def make_boxes(count: int, classes: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes [N, 4], scores [N] and groups [N] of ``batch`` images of ``count`` boxes each.

    A group is a class of an image. 90 % of the boxes lie around 100 objects, the others anywhere in
    640 x 480 pixels. No two scores are equal.
    """
    generator = torch.Generator().manual_seed(0)
    uniform = partial(torch.rand, generator=generator)
    total, image = batch * count, torch.tensor([640.0, 480.0])
    centres, sides = uniform(100, 2) * image, 16 + uniform(100, 2) * 200
    owner = torch.randint(0, 100, (total,), generator=generator)
    centre = centres[owner] + (uniform(total, 2) - 0.5) * sides[owner]
    far = uniform(total) < 0.1
    centre[far] = uniform(int(far.sum()), 2) * image
    half = sides[owner] * (0.7 + 0.6 * uniform(total, 2)) / 2
    labels = torch.randint(0, classes, (total,), generator=generator)
    groups = labels + torch.arange(batch).repeat_interleave(count) * classes
    scores = torch.randperm(total, generator=generator) / total
    return torch.cat([centre - half, centre + half], 1), scores, groups


def suppress(args: argparse.Namespace, device: torch.device) -> Rows:
    from torchvision.ops import batched_nms as torchvisions

    for batch, count, classes in product(args.batch, args.boxes, args.classes):
        boxes = [x.to(device) for x in make_boxes(count, classes, batch)]
        calls = {"ours": partial(batched_nms, *boxes, IOU, count, pixel=False),
                 "torchvision": partial(torchvisions, *boxes, IOU)}
        times, results = race(calls, args.rounds, device)
        kept, _ = results["ours"]
        if device.type == "cpu":
            expected = results["torchvision"]
        else:
            expected, _ = batched_nms(*(x.cpu() for x in boxes), IOU, count, pixel=False)
        if not torch.equal(kept.cpu(), expected):
            raise AssertionError(f"{count} boxes, {classes} classes: other boxes are kept")
        yield {"batch": batch, "boxes": count, "classes": classes, "kept": len(kept),
               "by": backend(device.type), "seconds": times,
               "times faster": times["torchvision"] / times["ours"]}


def plain_detections(detect: Detect, loc: Tensor, conf: Tensor, priors: Tensor,
                     sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Return what ``detect`` does: softmax and decoding of everything, then class by class."""
    from torchvision.ops import nms

    config, scores = detect.config, conf.float().softmax(2)
    boxes = decode(loc.float(), priors, detect.variance)
    found = []
    for score_of, box_of, size in zip(scores, boxes, sizes, strict=True):
        box_of = box_of * torch.tensor([*size, *size], device=loc.device)
        wider = box_of + torch.tensor([0, 0, 1, 1], device=loc.device)  # pixel convention
        parts = []
        for label in range(1, conf.shape[2]):
            over = score_of[:, label] > config.conf_thresh
            score = score_of[over, label]
            kept = nms(wider[over], score, config.nms_thresh)[: config.per_class]
            parts.append((box_of[over][kept], score[kept], torch.full_like(kept, label)))
        box, score, label = (torch.cat(columns) for columns in zip(*parts, strict=True))
        best = score.argsort(descending=True, stable=True)[: config.top_k]
        found.append({"boxes": box[best], "scores": score[best], "labels": label[best]})
    return found


def crowded(priors: Tensor, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return (loc, conf) with 140,000 scores over 0.02 an image: noise on a shifted background."""
    loc = torch.randn(batch, len(priors), 4, generator=generator) / 2
    conf = torch.randn(batch, len(priors), CLASSES, generator=generator) * 2
    conf[..., 0] += 6.72
    return loc, conf


def trained(priors: Tensor, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return (loc, conf) with a few hundred scores over 0.02 an image, of priors on 7 objects."""
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
            scores[row > 0.35, label % 80 + 1] += 11  # a second, mistaken class
    return loc, conf


@torch.inference_mode()
def forward(net: nn.Module, images: Tensor, amp: str) -> None:
    with autocast(images.device, amp):
        net(images)


def detect(args: argparse.Namespace, device: torch.device) -> Rows:
    net, priors = harness.new_net("SSD_HarDNet68", 512, device)
    net.eval()
    images = to_input(harness.random_images(args.batch, 512), INPUT_MEAN, device)
    for make in (crowded, trained):
        loc, conf = (x.to(device) for x in make(priors.cpu(), args.batch, torch.manual_seed(0)))
        layer, rest = Detect(), (loc, conf, priors, [(640, 480)] * args.batch)
        calls = {"Detect": partial(layer, *rest), "plain": partial(plain_detections, layer, *rest)}
        if make is trained:
            calls |= {f"forward {amp}": partial(forward, net, images, amp) for amp in args.amp}
        times, results = race(calls, args.rounds, device, warm_up=1)
        torch.testing.assert_close(results["Detect"], results["plain"], rtol=1e-4, atol=1e-3)
        over = conf.softmax(2)[..., 1:] > layer.config.conf_thresh
        yield {"outputs": make.__name__, "batch": args.batch,
               "scores": int(over.sum()) // args.batch, "seconds": times,
               "times faster": times["plain"] / times["Detect"],
               **{f"share of {k}": times["Detect"] / x for k, x in times.items() if "forward" in k}}


def parser() -> argparse.ArgumentParser:
    p = program("nms", __doc__)
    commands = p.add_subparsers(required=True, metavar="COMMAND")
    q = commands.add_parser("suppress", parents=[options(suppress, 20)], help="NMS alone")
    q.add_argument("--boxes", type=positive, nargs="+", default=[1000, 10_000], help="an image")
    q.add_argument("--classes", type=positive, nargs="+", default=[1, 20, 80])
    q.add_argument("--batch", type=positive, nargs="+", default=[1], help="images")
    q = commands.add_parser("detect", parents=[options(detect, 10)], help="outputs to detections")
    q.add_argument("--batch", type=positive, default=1)
    q.add_argument("--amp", choices=AMP_TYPES, nargs="+", default=["off", "bf16"])
    return p


main = command(partial(run, parser))

if __name__ == "__main__":
    raise SystemExit(main())
