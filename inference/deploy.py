"""Turn a trained detector into a faster network with equal outputs, for inference only.

    deployed = deploy(net)
    loc, conf = deployed(images)        # net.eval()(images), up to rounding
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inference.gathered_conv import gather_blocks
from models.base import on_meta


@torch.inference_mode(False)
def deploy(net: nn.Module, gather: bool = False) -> Deployed:
    """Return an inference network that computes what ``net`` computes in evaluation mode.

    Batch norms are folded into their convolutions, and the scale of ``L2Norm`` into the heads
    behind it. The location and confidence heads of a source map become one convolution. Weights lie
    channels last. ``net`` does not change.

    Args:
        net: a detector of ``models.build_net``, on any device.
        gather: convolutions of HarD blocks read their inputs where they lie, not from a
            concatenation. Needs Triton and a GPU, see ``inference.gathered_conv``.

    Raises ValueError: a batch norm of ``net`` cannot be folded: it is not the only reader of one
    convolution that runs once.
    """
    net = copy.deepcopy(net).eval().requires_grad_(False)
    _fold_batch_norms(net)
    if gather:
        gather_blocks(net)
    return Deployed(net).to(memory_format=torch.channels_last)


class Deployed(nn.Module):
    """Result of ``deploy``, with the interface of a detector (``models.ssd.Detector``).

    For half precision convert it, ``deployed.to(torch.bfloat16)``; autocast would convert the
    weights in every call. Images may be float32 in any case.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.num_classes = net.num_classes
        self.boxes_per_cell = [head.out_channels // 4 for head in net.loc]
        self.heads = nn.ModuleList(map(_side_by_side, zip(net.loc, net.conf, strict=True)))
        if hasattr(net, "L2Norm"):
            scale = net.L2Norm.weight
            self.heads[0].weight.data *= scale[:, None, None]
            net.L2Norm = _Normalise(net.L2Norm.eps)
        net.loc = net.conf = None
        self.net = net
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        loc, conf = [], []
        sources = self.net.sources(images.to(self.heads[0].weight.dtype))
        for head, x, a in zip(self.heads, sources, self.boxes_per_cell, strict=True):
            rows = head(x).permute(0, 2, 3, 1).flatten(1, 2)  # [B, cells, outputs]
            loc.append(rows[..., : a * 4].reshape(x.shape[0], -1, 4))
            conf.append(rows[..., a * 4 :].reshape(x.shape[0], -1, self.num_classes))
        return torch.cat(loc, 1), torch.cat(conf, 1)

    def train(self, mode: bool = True) -> Deployed:
        if mode:
            raise ValueError("a deployed network cannot be trained; train the one it was made of")
        return super().train(False)


class _Normalise(nn.Module):
    """``L2Norm`` without its scale: x / max(||x||_2 over channels, eps)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype)
        # Not norm + eps: ONNX exporters drop so small a term, which leaves 0 / 0.
        return (x / norm.clamp(min=self.eps)).to(x.dtype)


class _Readers(TorchDispatchMode):
    """Count the operations that read each tensor, by its id."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Callable, types: Sequence[type], args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        self.count.update(id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))


def _fold_batch_norms(net: nn.Module) -> None:
    convs = _convolutions_before(net)
    for path, module in list(net.named_modules()):
        for name, child in list(module.named_children()):
            if not isinstance(child, nn.BatchNorm2d):
                continue
            conv = module if isinstance(module, nn.Conv2d) else convs.get(child)  # NormedConv2d
            if conv is None:
                where = f"{path}.{name}".lstrip(".")
                raise ValueError(f"the batch norm {where} does not follow a convolution of its own")
            dtype = conv.weight.dtype
            # Double precision: folding rounds once.
            fused = fuse_conv_bn_eval(conv.double(), child.double()).to(dtype)
            conv.weight, conv.bias = fused.weight, fused.bias
            setattr(module, name, nn.Identity())
    net.requires_grad_(False)


def _convolutions_before(net: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return, for each batch norm that can be folded, the convolution to fold it into.

    A run on the meta device finds them: both run once, and the norm alone reads the output of the
    convolution.
    """
    shadow, readers, runs = on_meta(net), _Readers(), Counter()
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # keeps the tensors, so ids stay unique
    before: dict[nn.Module, tuple[nn.Module, Tensor]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        runs[module] += 1
        if isinstance(module, nn.Conv2d):
            made[id(output)] = (module, output)
            readers.count[id(output)] = 0
        elif id(inputs[0]) in made:
            before[module] = made[id(inputs[0])]

    for module in shadow.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(note)
    dtype = next(net.parameters()).dtype
    with torch.no_grad(), readers:
        shadow.sources(torch.empty(1, 3, 512, 512, dtype=dtype, device="meta"))
    real = dict(zip(shadow.modules(), net.modules(), strict=True))
    return {real[norm]: real[conv] for norm, (conv, output) in before.items()
            if runs[norm] == runs[conv] == readers.count[id(output)] == 1}


def _side_by_side(convs: Sequence[nn.Conv2d]) -> nn.Conv2d:
    """Return one convolution with the outputs of all ``convs``, which share their input."""
    merged = copy.deepcopy(convs[0])
    for name in ("weight", "bias"):
        values = torch.cat([getattr(conv, name) for conv in convs])
        setattr(merged, name, nn.Parameter(values, requires_grad=False))
    merged.out_channels = len(merged.bias)
    return merged
