"""An inference network equal to a trained detector: folded, merged, and without copies if wanted.

    deployed = deploy(net)
    loc, conf = deployed(images)        # as net.eval()(images), to rounding
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@torch.inference_mode(False)
def deploy(net: nn.Module, blocks: str = "concatenate", pad: int = 1) -> Deployed:
    """An inference network that computes what ``net`` does in evaluation mode.

    Batch norms are folded into their convolutions, ``L2Norm``'s scale into the heads behind it,
    the location and the confidence head of a source map are one convolution, and weights lie
    channels last. ``net`` stays as it is.

    Args:
        net: a detector of ``models.build_net``, on any device.
        blocks: how layers of a HarD block come by their inputs, which lie in several tensors:
            "concatenate": copied side by side, as in training;
            "slices": the activation writes into a slice of the buffer of one consumer; further
            consumers get copies;
            "split": a convolution over a concatenation is the sum of convolutions over its parts,
            and all convolutions of a part are one, so that nothing is put side by side but sums
            are read and written;
            "gather": ``inference.gathered_conv`` reads from several tensors (Triton, on a GPU).
        pad: HarD blocks' layers get filters of zeros up to a multiple of so many outputs, which
            matrix units may want. Exact: their outputs are zeros that zeros multiply.

    Returns:
        A module in evaluation mode, without gradients, with the interface of ``net``.

    Raises:
        ValueError: an unknown ``blocks``, a ``pad`` below 1, or a network with a batch norm that
            does not follow a convolution of its own.
    """
    if blocks not in BLOCKS:
        raise ValueError(f"blocks is {blocks!r}, should be one of {', '.join(BLOCKS)}")
    if pad < 1:
        raise ValueError(f"pad is {pad}, should be at least 1")
    net = copy.deepcopy(net).eval().requires_grad_(False)
    _fold_batch_norms(net)
    _replace_blocks(net, BLOCKS[blocks], pad)
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
    merged = copy.copy(convs[0])
    merged._parameters = {}
    return _set(merged, *(torch.cat([getattr(c, x) for c in convs]) for x in ("weight", "bias")))


# ---------------------------------------------------------------- HarD blocks


def _replace_blocks(net: nn.Module, kind: type[HarmonicBlock], pad: int) -> None:
    """Every HarD block, with the 1x1 convolution behind it, by a ``kind``."""
    from models.hardnet import HarDBlock

    for module in list(net.modules()):
        for (name, block), (following, behind) in pairwise(list(module.named_children())):
            if isinstance(block, HarDBlock):
                setattr(module, name, nn.Identity())
                setattr(module, following, kind(block, behind, pad))


class _Layer(nn.Module):
    """A folded layer: the convolution that meets the inputs, and what comes behind it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        leaves = [m for m in layer.modules() if not list(m.children())]
        self.conv, *rest = (m for m in leaves if not isinstance(m, nn.Identity))
        self.rest = nn.Sequential(*rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.conv(x))


class HarmonicBlock(nn.Module):
    """A HarD block and the convolution behind it: [B, C, H, W] -> [B, outputs, H, W].

    Value 0 is the input, value l the output of layer l; ``links[l - 1]`` are the values that layer
    l takes, in order. The last layer is the convolution behind the block, and the result its
    output. Inputs are copied side by side.
    """

    def __init__(self, block: nn.Module, behind: nn.Module, pad: int = 1) -> None:
        super().__init__()
        self.links = [*block.links, block.outputs]
        self.layers = nn.ModuleList(map(_Layer, [*block.layers, behind]))
        convs = [layer.conv for layer in self.layers]
        self.widths = [convs[0].in_channels, *(conv.out_channels for conv in convs)]
        if pad > 1:
            self._pad(pad)

    def _pad(self, multiple: int) -> None:
        """Widen all layers but the last with filters of zeros."""
        before = self.widths
        self.widths = [-(-w // multiple) * multiple for w in before]
        self.widths[0], self.widths[-1] = before[0], before[-1]
        for i, (links, layer) in enumerate(zip(self.links, self.layers, strict=True), start=1):
            wide = layer.conv.weight.new_zeros(
                self.widths[i], sum(self.widths[j] for j in links), *layer.conv.kernel_size
            )
            parts = layer.conv.weight.split([before[j] for j in links], 1)
            places = wide.split([self.widths[j] for j in links], 1)
            for part, place in zip(parts, places, strict=True):
                place[: before[i], : part.shape[1]] = part
            _set(layer.conv, wide, _longer(layer.conv.bias, self.widths[i]))
            for conv in layer.rest:
                if isinstance(conv, nn.Conv2d):  # depth-wise
                    _set(conv, *(_longer(x, self.widths[i]) for x in (conv.weight, conv.bias)))
                    conv.groups = self.widths[i]

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for links, layer in zip(self.links, self.layers, strict=True):
            inputs = [values[i] for i in links]
            values.append(layer(inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1)))
        return values[-1]

    def consumers(self, value: int) -> list[tuple[int, int]]:
        """(layer, first channel in its input) of every layer that takes ``value``, in order."""
        return [
            (layer, sum(self.widths[i] for i in links[: links.index(value)]))
            for layer, links in enumerate(self.links, start=1)
            if value in links
        ]


class SlicedBlock(HarmonicBlock):
    """Every value is written into the buffers of the layers that take it together with others.

    The activation itself writes into the first of them, unless a layer takes the value alone.
    """

    def __init__(self, block: nn.Module, behind: nn.Module, pad: int = 1) -> None:
        super().__init__(block, behind, pad)
        self.places = [
            [(layer, first) for layer, first in self.consumers(i) if len(self.links[layer - 1]) > 1]
            for i in range(len(self.layers))
        ]
        self.alone = [len(p) < len(self.consumers(i)) for i, p in enumerate(self.places)]

    def forward(self, x: Tensor) -> Tensor:
        buffers: dict[int, Tensor] = {}

        def place(value: int, layer: int, first: int) -> Tensor:
            if layer not in buffers:
                channels = sum(self.widths[i] for i in self.links[layer - 1])
                buffers[layer] = torch.empty(
                    (len(x), channels, *x.shape[2:]),
                    dtype=x.dtype,
                    device=x.device,
                    memory_format=torch.channels_last,
                )
            return buffers[layer][:, first : first + self.widths[value]]

        for layer, first in self.places[0]:
            place(0, layer, first).copy_(x)
        for i, (links, layer) in enumerate(zip(self.links, self.layers, strict=True), start=1):
            # No longer referred to, a buffer is free for the next.
            y = layer.conv(x if len(links) == 1 else buffers.pop(i))
            if i == len(self.layers):
                return layer.rest(y)
            places = self.places[i]
            if len(layer.rest) == 1 and isinstance(layer.rest[0], nn.ReLU) and not self.alone[i]:
                x = torch.clamp_min(y, 0, out=place(i, *places[0]))
                places = places[1:]
            else:
                x = layer.rest(y)
            for target, first in places:
                place(i, target, first).copy_(x)


class SplitBlock(HarmonicBlock):
    """A layer's convolution is the sum of convolutions of its inputs; all of one input are one."""

    def __init__(self, block: nn.Module, behind: nn.Module, pad: int = 1) -> None:
        super().__init__(block, behind, pad)
        # Layers of one kernel size: 3x3 and 1x1 convolutions of a value cannot be one.
        self.groups = []
        self.parts = nn.ModuleList()
        for value in range(len(self.layers)):
            groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for layer, first in self.consumers(value):
                kernel = self.layers[layer - 1].conv.kernel_size
                groups.setdefault(kernel, []).append((layer, first))
            self.groups.append([[layer for layer, _ in group] for group in groups.values()])
            self.parts.append(nn.ModuleList(
                self._convolution(value, group) for group in groups.values()
            ))  # fmt: skip
        for layer in self.layers:
            layer.conv = None

    def _convolution(self, value: int, group: list[tuple[int, int]]) -> nn.Conv2d:
        """``value``'s share of the convolutions of a group of (layer, first channel)."""
        convs = [self.layers[layer - 1].conv for layer, _ in group]
        merged, width = copy.copy(convs[0]), self.widths[value]
        weights = [
            conv.weight[:, first : first + width]
            for conv, (_, first) in zip(convs, group, strict=True)
        ]
        # The share of a layer's last input adds the bias, as it starts the sum.
        biases = [
            conv.bias if self.links[layer - 1][-1] == value else torch.zeros_like(conv.bias)
            for conv, (layer, _) in zip(convs, group, strict=True)
        ]
        merged._parameters = {}
        return _set(merged, torch.cat(weights), torch.cat(biases))

    def forward(self, x: Tensor) -> Tensor:
        sums: dict[int, Tensor] = {}
        for value, (groups, convs) in enumerate(zip(self.groups, self.parts, strict=True)):
            for group, conv in zip(groups, convs, strict=True):
                shares = conv(x).split([self.widths[layer] for layer in group], 1)
                for layer, share in zip(group, shares, strict=True):
                    sums[layer] = sums[layer].add_(share) if layer in sums else share
            x = self.layers[value].rest(sums.pop(value + 1))
        return x


class GatheredBlock(HarmonicBlock):
    """Convolutions that read their inputs where they lie, ``inference.gathered_conv``."""

    def __init__(self, block: nn.Module, behind: nn.Module, pad: int = 1) -> None:
        from inference.gathered_conv import pack

        super().__init__(block, behind, pad)
        for links, layer in zip(self.links, self.layers, strict=True):
            activation, layer.rest = layer.rest[0], layer.rest[1:]
            widths = [self.widths[i] for i in links]
            name = type(activation).__name__.lower()
            layer.conv = pack(layer.conv.weight, layer.conv.bias, widths, name)

    def forward(self, x: Tensor) -> Tensor:
        from inference.gathered_conv import gathered_conv2d

        values = [x]
        for links, layer in zip(self.links, self.layers, strict=True):
            values.append(layer.rest(gathered_conv2d([values[i] for i in links], layer.conv)))
        return values[-1]


BLOCKS = {
    "concatenate": HarmonicBlock,
    "slices": SlicedBlock,
    "split": SplitBlock,
    "gather": GatheredBlock,
}
"""Values of ``deploy``'s ``blocks``."""


def _longer(x: Tensor, length: int) -> Tensor:
    """``x`` with zeros behind it, up to ``length`` rows."""
    return torch.cat([x, x.new_zeros(length - len(x), *x.shape[1:])])


def _set(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """Give a convolution other parameters, of any number of channels."""
    conv.weight = nn.Parameter(weight, requires_grad=False)
    conv.bias = nn.Parameter(bias, requires_grad=False)
    conv.out_channels, inputs = weight.shape[:2]
    conv.in_channels = inputs * conv.groups
    return conv
