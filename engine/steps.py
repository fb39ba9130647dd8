"""One training step, and detection over a data set."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data.config import INPUT_MEAN
from engine.distributed import SINGLE_PROCESS, World, no_sync
from layers import Detect, MultiBoxLoss
from utils.device import autocast, to_input

Batch = tuple[Tensor, list[Tensor], list[int]]
"""Images uint8 [B, 3, S, S]; ground truth [n, 5] of each; their indices in the data set."""


@dataclass(frozen=True)
class Step:
    """Result of one training step. Its values may still be on their way from a GPU."""

    lr: float
    images: Tensor
    """The last batch, uint8 [B, 3, S, S]."""
    targets: list[Tensor]
    """Ground truth of those images, [n, 5] each."""
    values: Tensor
    arrived: torch.cuda.Event | None

    def results(self) -> tuple[float, float, bool]:
        """Return (location loss, confidence loss, whether any process was asked to stop).

        The losses are those of the batch of all processes. Waits until a GPU has finished the step.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        loss_loc, loss_conf, stop = self.values.tolist()
        return loss_loc, loss_conf, stop > 0


class TrainStep:
    """Forward, loss, backward and update of one optimiser step.

    A step may be cut into parts (gradient accumulation). Its losses are divided by the positive
    priors of all its parts and processes, so that the parts give the gradient of the whole batch,
    up to batch normalisation and rounding. The step waits for a GPU only under fp16 (the gradient
    scaler) and with synchronised batch norms.

    Args of the constructor:
        net: maps images to (loc, conf). Over several processes it is ``world.replicate(net)``.
        criterion: the sum of its two losses is minimised.
        priors: [P, 4], on the device of the network.
        optimizer: updates the parameters of ``net``.
        amp: a key of ``utils.device.AMP_TYPES``.
        clip_norm: largest L2 norm of the gradient of all parameters; 0: any.
        frozen: modules of ``net`` that stay in evaluation mode.
        world: the processes that train together.
    """

    def __init__(self, net: nn.Module, criterion: MultiBoxLoss, priors: Tensor,
                 optimizer: torch.optim.Optimizer, *, amp: str = "off", clip_norm: float = 0.0,
                 frozen: Sequence[nn.Module] = (), world: World = SINGLE_PROCESS):
        self.net = net
        self.criterion = criterion
        self.priors = priors
        self.optimizer = optimizer
        self.amp = amp
        self.clip_norm = clip_norm
        self.frozen = frozen
        self.world = world
        self.scaler = torch.amp.GradScaler(priors.device.type, enabled=amp == "fp16")

    def __call__(self, parts: Sequence[Batch], lr: float, stop: bool = False) -> Step:
        """Make one step with learning rate ``lr`` from the batches ``parts``.

        ``stop``: whether this process was asked to stop; ``Step.results`` tells all processes.
        A loss that is not finite has already spoilt the weights when the step returns.
        """
        self.net.train()
        for module in self.frozen:
            module.eval()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        total = self._backward(parts)
        total[2] = float(stop)
        self.world.sum(total)
        if self.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.net.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        values, arrived = total.to("cpu", non_blocking=total.is_cuda), None
        if total.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(total.device))
        images, targets, _ = parts[-1]
        return Step(lr, images, targets, values, arrived)

    def _backward(self, parts: Sequence[Batch]) -> Tensor:
        """Add the gradients of all parts; return [location loss, confidence loss, 0]."""
        device = self.priors.device
        matched = [self.criterion.match(targets, self.priors) for _, targets, _ in parts]
        count = self.world.sum(sum(self.criterion.count(labels) for labels, _ in matched))
        total = torch.zeros(3, device=device)
        for k, ((images, _, _), (labels, offsets)) in enumerate(zip(parts, matched, strict=True)):
            last = k == len(parts) - 1
            with contextlib.nullcontext() if last else no_sync(self.net):
                with autocast(device, self.amp):
                    outputs = self.net(to_input(images, INPUT_MEAN, device))
                losses = self.criterion.loss(outputs, labels, offsets, count)
                # DDP averages gradients over the processes, but these losses are to be summed.
                self.scaler.scale(sum(losses) * self.world.size).backward()
            total[:2] += torch.stack(losses).detach()
        return total


@torch.no_grad()
def detect_all(
    net: nn.Module, detect: Detect, priors: Tensor,
    batches: Iterable[tuple[Tensor, Sequence[Tensor]]], amp: str = "off",
    on_batch: Callable[[int], None] = lambda images: None,
) -> list[dict[str, np.ndarray]]:
    """Return the detections of every image, in order. The mode of ``net`` is restored afterwards.

    Args:
        net: maps images to (loc, conf).
        priors: [P, 4], on the device of the network.
        batches: (uint8 images [B, 3, S, S], (width, height) of each original image).
        amp: a key of ``utils.device.AMP_TYPES``.
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
                loc, conf = net(to_input(images, INPUT_MEAN, priors.device))
            found = detect(loc, conf, priors, [tuple(size.tolist()) for size in sizes])
            detections += [{key: value.cpu().numpy() for key, value in d.items()} for d in found]
            on_batch(len(images))
        return detections
    finally:
        net.train(was_training)
