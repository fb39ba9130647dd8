"""An inference network equal to a trained detector: folded and merged.

    deployed = deploy(net)
    loc, conf = deployed(images)        # as net.eval()(images), to rounding
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inference.gathered_conv import gather_blocks


@torch.inference_mode(False)
def deploy(net: nn.Module, gather: bool = False) -> Deployed:
    """An inference network that computes what ``net`` does in evaluation mode.

    Batch norms are folded into their convolutions, ``L2Norm``'s scale into the heads behind it,
    the location and the confidence head of a source map are one convolution, and weights lie
    channels last. ``net`` stays as it is.

    Args:
        net: a detector of ``models.build_net``, on any device.
        gather: the convolutions of HarD blocks read their inputs where they lie instead of from
            a concatenation (``inference.gathered_conv``: Triton, on a GPU).

    Returns:
        A module in evaluation mode, without gradients, with the interface of ``net``.

    Raises:
        ValueError: a network with a batch norm that does not follow a convolution of its own.
    """
    net = copy.deepcopy(net).eval().requires_grad_(False)
    _fold_batch_norms(net)
    if gather:
        gather_blocks(net)
    return Deployed(net).to(memory_format=torch.channels_last)


class Deployed(nn.Module):
    """What ``deploy`` returns: images [B, 3, S, S] (BGR, 0..255 minus the mean) -> ``loc``
    [B, P, 4] and ``conf`` [B, P, num_classes] logits, as the detector.

    For half precision it is converted, ``deployed.to(torch.bfloat16)``: under autocast weights
    would be converted anew with every call. Images may be float32 all the same.
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
    """``L2Norm`` without its scale."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype)
        # Not their sum: exporters to ONNX drop so small a term, and 0 / 0 is left.
        return (x / norm.clamp(min=self.eps)).to(x.dtype)


class _Readers(TorchDispatchMode):
    """How many operations have read a tensor, by its id."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count.update(id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))


def _fold_batch_norms(net: nn.Module) -> None:
    """Every batch norm into the convolution before it.

    A run without data shows which that is, and that both run once and nothing lies between them or
    reads the convolution's output beside the norm.
    """
    dtype = next(net.parameters()).dtype
    tensors = [*net.parameters(), *net.buffers()]
    shadow = copy.deepcopy(net, memo={id(t): t.to("meta") for t in tensors})
    readers, runs = _Readers(), Counter()
    made: dict[int, tuple[nn.Module, Tensor, int]] = {}  # tensors are kept, so that ids stay theirs
    before: dict[nn.Module, tuple[nn.Module, Tensor, int]] = {}

    def note(conv: nn.Module, _, output: Tensor) -> None:
        runs[conv] += 1
        made[id(output)] = (conv, output, readers.count[id(output)])

    def find(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        runs[norm] += 1
        if id(inputs[0]) in made:
            before[norm] = made[id(inputs[0])]

    for module in shadow.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
        elif isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(find)
    with torch.no_grad(), readers:
        shadow.sources(torch.empty(1, 3, 512, 512, dtype=dtype, device="meta"))
    real = dict(zip(shadow.modules(), net.modules(), strict=True))
    convs = {
        real[norm]: real[conv]
        for norm, (conv, output, earlier) in before.items()
        if runs[norm] == runs[conv] == readers.count[id(output)] - earlier == 1
    }
    for path, module in list(net.named_modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                if child not in convs:
                    where = f"{path}.{name}".lstrip(".")
                    raise ValueError(
                        f"the batch norm {where} does not follow a convolution of its own"
                    )
                conv = convs[child]
                # In double precision, so that folding rounds once.
                fused = fuse_conv_bn_eval(conv.double(), child.double()).to(dtype)
                conv.weight, conv.bias = fused.weight, fused.bias
                setattr(module, name, nn.Identity())
    net.requires_grad_(False)


def _side_by_side(convs: Sequence[nn.Conv2d]) -> nn.Conv2d:
    """One convolution with the outputs of all ``convs``, which share their input."""
    first = convs[0]
    weight = torch.cat([conv.weight for conv in convs])
    bias = torch.cat([conv.bias for conv in convs])
    merged = nn.Conv2d(
        first.in_channels,
        len(weight),
        first.kernel_size,
        first.stride,
        first.padding,
        first.dilation,
        device="meta",
    )
    merged.weight = nn.Parameter(weight, requires_grad=False)
    merged.bias = nn.Parameter(bias, requires_grad=False)
    return merged
