"""What an optimiser is given, and the moving average of what it makes."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from engine.schedule import ema_decay_at


def parameter_groups(net: nn.Module, weight_decay: float, norm_decay: bool) -> list[dict]:
    """Parameters for an optimiser: one group, or two where norms and biases do not decay.

    What decays then are the weights of convolutions, the parameters of more than one dimension.
    """
    everything = list(net.parameters())
    if norm_decay:
        return [{"params": everything, "weight_decay": weight_decay}]
    return [
        {"params": [p for p in everything if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in everything if p.ndim <= 1], "weight_decay": 0.0},
    ]


OPTIMIZERS = ("sgd", "adamw")


def build_optimizer(net: nn.Module, options: Mapping) -> torch.optim.Optimizer:
    """The optimiser of ``options``: optimizer, lr, momentum, weight_decay, norm_decay."""
    groups = parameter_groups(net, options["weight_decay"], options["norm_decay"])
    if options["optimizer"] == "sgd":
        return torch.optim.SGD(groups, lr=options["lr"], momentum=options["momentum"])
    return torch.optim.AdamW(groups, lr=options["lr"], betas=(options["momentum"], 0.999))


class MovingAverage:
    """A copy of a network whose weights and batch statistics follow it by exponential average.

    ``net`` is the copy; ``updates`` counts the steps that it has followed.
    """

    def __init__(self, net: nn.Module, decay: float):
        self.net = copy.deepcopy(net).requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Move towards ``net``, on its device and without waiting for it."""
        averages, values = self.net.state_dict().values(), net.state_dict().values()
        pairs = list(zip(averages, values, strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        weight = 1 - ema_decay_at(self.updates, self.decay)
        torch._foreach_lerp_(*map(list, zip(*floats, strict=True)), weight)
        for average, value in pairs:
            if not average.is_floating_point():  # the batch counters
                average.copy_(value)
        self.updates += 1
