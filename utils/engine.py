"""The two loops, training steps and detection over a data set: their arguments are all they use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

AMP_TYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLoss(Exception):
    """The loss of a batch is not a number or infinite; no optimiser step was made with it."""

    def __init__(self, indices: Sequence[int], loss_loc: float, loss_conf: float):
        super().__init__(f"location loss {loss_loc}, confidence loss {loss_conf}")
        self.indices = indices


@dataclass(frozen=True)
class Step:
    """What one training iteration did."""

    lr: float
    loss_loc: float
    loss_conf: float
    images: Tensor
    """The batch as it was fed, uint8 [B, 3, S, S]."""


def to_input(images: Tensor, mean: Sequence[float], device: torch.device) -> Tensor:
    """uint8 [B, 3, S, S] -> float32 on the device, minus the per-channel mean, channels last."""
    images = images.to(device, non_blocking=True).float()
    images -= torch.tensor(mean, device=device).view(3, 1, 1)
    return images.contiguous(memory_format=torch.channels_last)


def autocast(device: torch.device, amp: str):
    """The context in which a network runs at precision ``amp`` (a key of ``AMP_TYPES``)."""
    dtype = AMP_TYPES[amp]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


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
    clip_norm: float = 0.0,
) -> Iterator[Step]:
    """Train on ``batches``, one optimiser step each; yields after every step.

    Args:
        net: maps images to (loc, conf); put into training mode here.
        criterion: maps ((loc, conf), priors, targets) to two losses, whose sum is minimised.
        priors: on the device that does the work.
        batches: (uint8 images [B, 3, S, S], targets, data-set indices of the images).
        scaler: enabled for fp16 only.
        learning_rates: one a step, drawn as the steps are made.
        amp: a key of ``AMP_TYPES``.
        clip_norm: largest L2 norm of the gradient of all parameters, 0: any.

    Raises:
        NonFiniteLoss: before the step that would spoil the weights.
    """
    net.train()
    for (images, targets, indices), lr in zip(batches, learning_rates, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr
        with autocast(priors.device, amp):
            outputs = net(to_input(images, mean, priors.device))
        loss_loc, loss_conf = criterion(outputs, priors, targets)
        loss = loss_loc + loss_conf
        # One transfer for both numbers; the check must come before the weights change.
        values = torch.stack([loss_loc, loss_conf]).tolist()
        if not np.isfinite(values).all():
            raise NonFiniteLoss(indices, *values)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if clip_norm:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
        scaler.step(optimizer)
        scaler.update()
        yield Step(lr, *values, images)


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
