"""The two loops, training steps and detection over a data set: their arguments are all they use."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from engine.distributed import SINGLE_PROCESS, World, no_sync
from utils.device import autocast, to_input


@dataclass(frozen=True)
class Step:
    """What one training step did. Its values may still be on their way from a GPU."""

    lr: float
    images: Tensor
    """The last batch as it was fed, uint8 [B, 3, S, S]."""
    targets: list[Tensor]
    """Of those images, [n, 5] each."""
    values: Tensor
    arrived: torch.cuda.Event | None

    def results(self) -> tuple[float, float, bool]:
        """(location loss, confidence loss, whether any process was asked to stop).

        Of the batch of all processes; waits for a GPU to have finished the step.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        loss_loc, loss_conf, stop = self.values.tolist()
        return loss_loc, loss_conf, stop > 0


def train_steps(
    net: nn.Module,
    criterion: nn.Module,
    priors: Tensor,
    batches: Iterable[tuple[Tensor, list[Tensor], list[int]]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    learning_rates: Iterable[float],
    mean: Sequence[float],
    amp: str,
    *,
    accumulate: int = 1,
    clip_norm: float = 0.0,
    world: World = SINGLE_PROCESS,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Train on ``batches``, an optimiser step from every ``accumulate`` of them.

    The losses of a step are divided by the positive priors of all its batches and processes: cut
    into parts, a batch gives the gradient of the whole, up to batch normalisation and rounding.
    Nothing here waits for a GPU, but for the scaler of fp16 and synchronised batch norms.

    Args:
        net: maps images to (loc, conf), over several processes as ``world.replicate`` gives it;
            put into training mode here.
        criterion: a ``layers.MultiBoxLoss``; the sum of its two losses is minimised.
        priors: on the device that does the work.
        batches: (uint8 images [B, 3, S, S], targets, data-set indices of the images).
        scaler: enabled for fp16 only.
        learning_rates: one a step, drawn as the steps are made.
        amp: a key of ``AMP_TYPES``.
        clip_norm: largest L2 norm of the gradient of all parameters, 0: any.
        stopping: asked once a step; ``Step.results`` tells what any process answered.

    Yields:
        After every step. A loss that is not finite has spoilt the weights by then.
    """
    net.train()
    device = priors.device
    batches = iter(batches)
    steps = iter(lambda: list(itertools.islice(batches, accumulate)), [])
    # The batches first: a rate is asked for only if there is a step to make with it.
    for parts, lr in zip(steps, learning_rates, strict=False):
        if len(parts) < accumulate:
            return
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        matched = [criterion.match(targets, priors) for _, targets, _ in parts]
        positives = world.sum(sum((labels > 0).sum() for labels, _ in matched))
        total = torch.zeros(3, device=device)
        for k, ((images, _, _), (labels, offsets)) in enumerate(zip(parts, matched, strict=True)):
            with no_sync(net) if k < accumulate - 1 else contextlib.nullcontext():
                with autocast(device, amp):
                    outputs = net(to_input(images, mean, device))
                losses = criterion.loss(outputs, labels, offsets, positives)
                # Over the processes gradients are averaged, but these losses are to be summed.
                scaler.scale(sum(losses) * world.size).backward()
            total[:2] += torch.stack(losses).detach()
        total[2] = float(stopping())
        world.sum(total)
        if clip_norm:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
        scaler.step(optimizer)
        scaler.update()
        values, arrived = total.to("cpu", non_blocking=True), None
        if device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(device))
        images, targets, _ = parts[-1]
        yield Step(lr, images, targets, values, arrived)


@torch.no_grad()
def detect_all(
    net: nn.Module,
    detect: nn.Module,
    priors: Tensor,
    batches: Iterable[tuple[Tensor, list[Tensor]]],
    mean: Sequence[float],
    amp: str,
    on_batch: Callable[[int], None] = lambda images: None,
) -> list[dict[str, np.ndarray]]:
    """Detections of every image, in order, as arrays; the net's mode is restored afterwards.

    Args:
        detect: maps (loc, conf, priors, sizes) to one dict of tensors an image.
        batches: (uint8 images [B, 3, S, S], (width, height) of each picture).
        on_batch: called with the number of images after every batch; may raise to stop.

    Returns:
        One {"boxes" float32 [n, 4] pixels, "scores" float32 [n], "labels" int64 [n]} an image.
    """
    was_training = net.training
    net.eval()
    try:
        detections = []
        for images, sizes in batches:
            with autocast(priors.device, amp):
                loc, conf = net(to_input(images, mean, priors.device))
            found = detect(loc, conf, priors, [tuple(size.tolist()) for size in sizes])
            detections += [{key: value.cpu().numpy() for key, value in d.items()} for d in found]
            on_batch(len(images))
        return detections
    finally:
        net.train(was_training)
