"""Learning rate, optimiser, and the moving average of the weights."""

import copy
import math

import torch
from torch import nn

from engine.options import Options
from utils.errors import UserError

LR_MILESTONES = (0.6, 0.8, 0.9)
"""Shares of the epochs after which the learning rate is multiplied by gamma (schedule "steps")."""
WARMUP_START_LR = 1e-6
COSINE_END = 0.01
"""Share of the learning rate that the schedule "cosine" ends with."""


def lr_at(step: int, steps_per_epoch: int, recipe: Options) -> float:
    """Return the learning rate of ``step``, 0-based and counted over the whole run.

    The rate rises linearly from 1e-6 to ``recipe.lr`` over the first ``warm_epoch`` epochs. Then
    "steps", the published schedule, multiplies ``lr`` by ``gamma`` at 60, 80 and 90 % of the epochs
    (rounded to whole epochs). "cosine" follows half a period from ``lr`` to a hundredth of it at
    the end of the last epoch (SGDR, arXiv 1608.03983, without restarts).
    """
    warm_steps = recipe.warm_epoch * steps_per_epoch
    if step < warm_steps:
        return WARMUP_START_LR + (recipe.lr - WARMUP_START_LR) * step / warm_steps
    if recipe.schedule == "cosine":
        done = (step - warm_steps) / (recipe.max_epoch * steps_per_epoch - warm_steps)
        share = COSINE_END + (1 - COSINE_END) * (1 + math.cos(math.pi * done)) / 2
        return recipe.lr * share
    epoch = step // steps_per_epoch
    passed = sum(epoch >= round(m * recipe.max_epoch) for m in LR_MILESTONES)
    return recipe.lr * recipe.gamma**passed


def freeze(net: nn.Module, parts: str) -> list[nn.Module]:
    """Let parameters of a detector keep their values, and return the modules that hold them.

    The optimiser leaves them out. Keep the modules in evaluation mode, so that their norms stay as
    they are, too.

    Args:
        parts: "base", "base:K" for the first K layers of the base network, "heads", or "" for none.

    Raises:
        UserError: the base network has fewer layers.
    """
    name, _, layers = parts.partition(":")
    modules = {"": [], "base": list(net.base), "heads": [net.loc, net.conf]}[name]
    if layers and int(layers) > len(modules):
        raise UserError(f"--freeze {parts}: the base network has {len(modules)} layers; give fewer")
    modules = modules[: int(layers)] if layers else modules
    for module in modules:
        module.requires_grad_(False)
    return modules


def parameter_groups(net: nn.Module, recipe: Options) -> list[dict]:
    """Return parameter groups for an optimiser, without frozen parameters.

    Without ``norm_decay``, weights of convolutions (parameters of more than one dimension) decay;
    biases and the weights of norms do not. "lr_factor" multiplies the learning rate of a group; it
    is ``base_lr`` for the base network.
    """
    base = set(net.base.parameters()) if recipe.base_lr != 1 else set()
    groups: dict[tuple[bool, bool], list] = {}
    for parameter in net.parameters():
        if parameter.requires_grad:
            decays = recipe.norm_decay or parameter.ndim > 1
            groups.setdefault((decays, parameter in base), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": recipe.weight_decay if decays else 0.0,
         "lr_factor": recipe.base_lr if in_base else 1.0}
        for (decays, in_base), parameters in groups.items()
    ]  # fmt: skip


def build_optimizer(net: nn.Module, recipe: Options) -> torch.optim.Optimizer:
    """Return the optimiser of the recipe for all parameters of ``net`` that are not frozen."""
    groups = parameter_groups(net, recipe)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.momentum, 0.999))


class MovingAverage:
    """A copy of a network whose weights and batch statistics follow it by exponential average.

    ``net`` is the copy. ``updates`` counts the steps n that it has followed. The share that it
    keeps of itself grows as (1 + n) / (10 + n) up to ``decay``: an early average spans the last
    tenth of the run so far, and forgets the random weights of the start.
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
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(*map(list, zip(*floats, strict=True)), weight)
        for average, value in pairs:
            if not average.is_floating_point():  # the batch counters
                average.copy_(value)
        self.updates += 1


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if the state of a parameter is not finite, or of another shape than it."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            tensor = torch.as_tensor(0.0 if value is None else value)
            if tensor.dim() and tensor.shape != parameter.shape or not tensor.isfinite().all():
                raise ValueError(f"{name} {list(tensor.shape)} of a {list(parameter.shape)}")
