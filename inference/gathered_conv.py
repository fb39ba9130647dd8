"""A convolution that reads its input from several tensors, without a concatenation (Triton).

    weight = GatheredWeight(conv.weight, conv.bias, widths=[14, 24, 64], activation="relu")
    y = gathered_conv2d([a, b, x], weight)  # relu(conv2d(cat([a, b, x], 1))), up to rounding

For inference on a GPU, without gradients. Triton comes with PyTorch's CUDA builds. The first call
imports it. Its interpreter (``TRITON_INTERPRET=1`` in the environment) computes on the CPU, slowly.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.hardnet import HarDBlock

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_PARTS = 9
TILES = ((64, 16), (128, 16), (64, 32), (128, 32), (64, 64), (128, 64), (128, 128))
"""Candidate tiles of one program, pixels x outputs; autotuning takes the fastest."""


class GatheredWeight(nn.Module):
    """The weights of a convolution as the kernel reads them.

    ``weight`` [k * k * sum of widths, O padded to a multiple of 16]: a row per part, tap and
    channel, in this order. ``bias`` [O]. Both are buffers, so ``to`` moves them.

    Args of the constructor:
        weight: [O, sum of widths, k, k] with k 1 or 3, of a convolution with stride 1, padding
            k // 2, dilation 1 and one group.
        bias: [O].
        widths: channels of the 1 to 9 input tensors, in order.
        activation: "linear", "relu" or "relu6", applied to the result.

    Raises ValueError: other shapes, widths that do not add up, an unknown activation or dtype.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, widths: Sequence[int],
                 activation: str) -> None:
        super().__init__()
        outputs, inputs, *kernel = weight.shape
        if kernel not in ([1, 1], [3, 3]):
            raise ValueError(f"the kernel is {'x'.join(map(str, kernel))}, should be 1x1 or 3x3")
        if bias.shape != (outputs,):
            raise ValueError(f"the bias is {list(bias.shape)}, should be [{outputs}]")
        if not 1 <= len(widths) <= MAX_PARTS:
            raise ValueError(f"{len(widths)} parts, should be 1 to {MAX_PARTS}")
        if min(widths) < 1 or sum(widths) != inputs:
            raise ValueError(f"the widths {list(widths)} do not add up to {inputs} input channels")
        if activation not in ("linear", "relu", "relu6"):
            raise ValueError(f"the activation is {activation!r}, should be linear, relu or relu6")
        if weight.dtype not in DTYPES:
            raise ValueError(f"the weights are {weight.dtype}, not float32, bfloat16 or float16")
        self.widths, self.kernel, self.activation = tuple(widths), kernel[0], activation
        parts = weight.detach().split(list(widths), 1)
        rows = torch.cat([part.permute(2, 3, 1, 0).reshape(-1, outputs) for part in parts])
        # Wide loads need the alignment.
        self.register_buffer("weight", F.pad(rows, (0, -outputs % 16)))
        self.register_buffer("bias", bias.detach().clone())


def gathered_conv2d(parts: Sequence[Tensor], weight: GatheredWeight,
                    out: Tensor | None = None) -> Tensor:
    """Convolve the concatenation of ``parts``, add the bias, apply the activation, in one kernel.

    Accumulates in float32. float32 inputs are multiplied exactly, or as TF32 if
    ``torch.backends.cuda.matmul.allow_tf32`` is set. The first call with a shape times a few tiles
    on the GPU and keeps the result in Triton's cache; later calls can be captured in a CUDA graph.
    On the meta device only shapes are propagated, as by one convolution.

    Args:
        parts: [B, C_k, H, W] each, with the widths, dtype and device of ``weight``, channels last.
            A part may be a channel slice of a wider channels-last tensor.
        out: [B, O, H, W], receives the result: channels last, or a channel slice of a wider tensor
            that does not overlap the parts, and is returned. None: a new tensor.

    Raises:
        ValueError: other widths, shapes, memory layout, dtype or device; a part needs a gradient.
        RuntimeError: Triton cannot be imported, or is too old.
    """
    if len(parts) != len(weight.widths):
        raise ValueError(f"{len(parts)} parts, the weights are for {len(weight.widths)}")
    x = parts[0]
    if x.ndim != 4:
        raise ValueError(f"part 0 has {x.ndim} dimensions, should have 4")
    batch, _, height, width = x.shape
    for i, (part, channels) in enumerate(zip(parts, weight.widths, strict=True)):
        _check(f"part {i}", part, (batch, channels, height, width), weight)
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        raise ValueError("gathered_conv2d has no gradient; call it under torch.no_grad()")
    shape = (batch, len(weight.bias), height, width)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    _check("out", out, shape, weight)
    if x.device.type == "meta":
        inputs = x.new_empty(batch, sum(weight.widths), height, width)
        filters = x.new_empty(shape[1], inputs.shape[1], weight.kernel, weight.kernel)
        F.conv2d(inputs, filters, padding=weight.kernel // 2)
        return out
    _launch(parts, weight, out)
    return out


def _launch(parts: Sequence[Tensor], weight: GatheredWeight, out: Tensor) -> None:
    batch, outputs, height, width = out.shape
    rows = tuple(_row(part, f"part {i}") for i, part in enumerate(parts))
    out_row = _row(out, "out")
    pixels = batch * height * width
    if not pixels:
        return
    kernel = _kernel(out.device.type)
    with torch.cuda.device_of(out):  # Triton launches on the current device
        kernel[lambda meta: (-(-pixels // meta["BLOCK_M"]) * -(-outputs // meta["BLOCK_N"]),)](
            tuple(parts), weight.weight, weight.bias, out, height, width, pixels,
            WIDTHS=weight.widths, ROWS=rows,
            VECTORS=tuple(_vector(x, row) for x, row in zip(parts, rows, strict=True)),
            CHUNKS=tuple(_chunk(weight.kernel**2 * w, out.itemsize) for w in weight.widths),
            OUTPUTS=outputs, OUT_ROW=out_row, OUT_VECTOR=_vector(out, out_row),
            COLUMNS=weight.weight.shape[1], KERNEL=weight.kernel, ACTIVATION=weight.activation,
            PRECISION="tf32" if out.dtype == torch.float32 and _allow_tf32() else "ieee",
            # The interpreter multiplies bfloat16's bits as integers.
            WIDEN=out.device.type == "cpu",
            enable_fp_fusion=True,
        )


def gather_blocks(net: nn.Module) -> None:
    """Replace each HarD block, with the convolution behind it, by a ``GatheredBlock``.

    The batch norms of ``net`` are folded already.
    """
    for module in list(net.modules()):
        for (name, block), (following, behind) in pairwise(list(module.named_children())):
            if isinstance(block, HarDBlock):
                setattr(module, name, nn.Identity())
                setattr(module, following, GatheredBlock(block, behind))


class GatheredBlock(nn.Module):
    """A HarD block and the convolution behind it: [B, C, H, W] -> [B, outputs, H, W].

    Value 0 is the input, value l the output of layer l. ``links[l - 1]`` lists the values that
    layer l reads. The last layer is the convolution behind the block.
    """

    def __init__(self, block: HarDBlock, behind: nn.Module) -> None:
        super().__init__()
        self.links = [*block.links, block.outputs]
        layers = [
            [m for m in layer.modules() if not list(m.children()) and type(m) is not nn.Identity]
            for layer in (*block.layers, behind)
        ]
        widths = [layers[0][0].in_channels, *(conv.out_channels for conv, *_ in layers)]
        self.convs = nn.ModuleList(
            GatheredWeight(conv.weight, conv.bias, [widths[i] for i in links],
                           type(act).__name__.lower())
            for links, (conv, act, *_) in zip(self.links, layers, strict=True)
        )
        self.rest = nn.ModuleList(nn.Sequential(*rest) for _, _, *rest in layers)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for links, conv, rest in zip(self.links, self.convs, self.rest, strict=True):
            values.append(rest(gathered_conv2d([values[i] for i in links], conv)))
        return values[-1]


# ---------------------------------------------------------------- checks and geometry


def _allow_tf32() -> bool:
    """Return whether TF32 is allowed, by the setting of PyTorch 2.9 or the older one."""
    matmul = torch.backends.cuda.matmul
    newer = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if newer is None else newer == "tf32"


def _check(name: str, x: Tensor, shape: tuple[int, ...], weight: GatheredWeight) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} is {list(x.shape)}, should be {list(shape)}")
    if x.dtype != weight.weight.dtype:
        raise ValueError(f"{name} is {x.dtype}, the weights are {weight.weight.dtype}")
    if x.device != weight.weight.device:
        raise ValueError(f"{name} is on {x.device}, the weights are on {weight.weight.device}")


def _row(x: Tensor, name: str) -> int:
    """Return the distance between neighbouring pixels in elements, equal over all images."""
    batch, channels, height, width = x.shape
    steps = (1, width, height * width)
    strides = (x.stride(3), x.stride(2), x.stride(0))
    sizes = (width, height, batch)
    # The stride of a side of one element has no meaning.
    used = [(step, s) for step, s, n in zip(steps, strides, sizes, strict=True) if n > 1]
    row = used[0][1] // used[0][0] if used else channels
    dense = all(stride == step * row for step, stride in used)
    if row < channels or not dense or (channels > 1 and x.stride(1) != 1):
        raise ValueError(f"{name} of shape {list(x.shape)} has strides {list(x.stride())}, should "
                         "lie channels last, or be a slice of the channels of a tensor that does")
    return row


def _vector(x: Tensor, row: int) -> int:
    """Return how many channels one load may read, so that it is aligned at every pixel."""
    return math.gcd(16 // x.itemsize, x.shape[1], row, x.data_ptr() // x.itemsize)


def _chunk(terms: int, itemsize: int) -> int:
    """Return how many terms of a part's sum one matrix product takes.

    Taps and channels of a part form one axis: widths such as 14, 24 or 70 would waste much of each
    tap. 9 x 14 terms fill two chunks of 64 to 98 %; tap by tap they would fill 22 %. Return the
    longest chunk, up to 128 bytes (a cache line), that wastes at most a tenth more than the
    shortest.
    """
    padded = {chunk: -(-terms // chunk) * chunk for chunk in (16, 32, 64)}
    return max(c for c, n in padded.items() if c * itemsize <= 128 and n <= 1.1 * padded[16])


# ---------------------------------------------------------------- kernel


@cache
def _kernel(device: str) -> Any:
    """Return the kernel; its first call compiles it, or it is interpreted."""
    global tl  # Triton looks names up in the module that a kernel is written in.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device != "cuda" and not interpreted:
        raise ValueError(f"gathered_conv2d needs a CUDA GPU, the tensors are on {device}")
    try:
        import triton
        import triton.language as tl
    except ImportError as error:
        raise RuntimeError(f"gathered_conv2d needs Triton, which cannot be imported ({error}); it "
                           "comes with PyTorch's CUDA builds: pip install triton") from error
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
        raise RuntimeError(
            f"gathered_conv2d needs Triton 3.4 or later (PyTorch 2.8), this is {triton.__version__}"
        )
    tiles = ((32, 128),) if interpreted else TILES  # there, few steps are what counts
    configs = [triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=8 if m * n > 8192 else 4)
               for m, n in tiles]
    key = "height width pixels WIDTHS ROWS VECTORS OUTPUTS OUT_ROW OUT_VECTOR KERNEL PRECISION"
    prune = {"early_config_prune": _fitting}
    tune = triton.autotune(configs, key.split(), prune_configs_by=prune, cache_results=True)
    return tune(triton.jit(_convolve))


def _fitting(configs: list[Any], arguments: dict, **constants: Any) -> list[Any]:
    """Keep tiles no wider than the outputs, yet wide enough to read each input only a few times."""
    widest = min(128, max(16, 1 << (constants["OUTPUTS"] - 1).bit_length()))
    return [c for c in configs if widest // 4 <= c.kwargs["BLOCK_N"] <= widest]


def _convolve(
    parts, weight, bias, out, height, width, pixels, WIDTHS: tl.constexpr, ROWS: tl.constexpr,
    VECTORS: tl.constexpr, CHUNKS: tl.constexpr, OUTPUTS: tl.constexpr, OUT_ROW: tl.constexpr,
    OUT_VECTOR: tl.constexpr, COLUMNS: tl.constexpr, KERNEL: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Triton: an implicit matrix product, [pixels, terms] x [terms, outputs] -> [pixels, outputs].

    A program computes BLOCK_M pixels x BLOCK_N outputs, part by part in chunks of terms.
    """
    TAPS: tl.constexpr = KERNEL * KERNEL
    BYTES: tl.constexpr = out.dtype.element_ty.primitive_bitwidth // 8
    TILES_N: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    first = tl.program_id(0) // TILES_N * BLOCK_M  # neighbours in time share their pixels
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel = first + m
    x, y = pixel % width, pixel // width % height
    # Bit t of a pixel: whether tap t lies in the map.
    inside = tl.zeros((BLOCK_M,), tl.int32)
    for tap in tl.static_range(TAPS):
        y_tap = y + tap // KERNEL - KERNEL // 2
        x_tap = x + tap % KERNEL - KERNEL // 2
        in_map = (y_tap >= 0) & (y_tap < height) & (x_tap >= 0) & (x_tap < width)
        inside |= (in_map & (pixel < pixels)).to(tl.int32) << tap
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(len(WIDTHS)):
        # Offsets from a tile's first pixel fit 32 bits, those from a large tensor's start may not.
        source = parts[i] + first.to(tl.int64) * ROWS[i]
        for start in range(0, TAPS * WIDTHS[i], CHUNKS[i]):
            k = start + tl.arange(0, CHUNKS[i])
            taps = tl.minimum(k // WIDTHS[i], TAPS)  # behind the last term: a bit that is not set
            shift = (taps // KERNEL - KERNEL // 2) * width + taps % KERNEL - KERNEL // 2
            offset = shift * ROWS[i] + k - taps * WIDTHS[i]
            pointers = source + (m[:, None] * ROWS[i] + offset[None, :])
            # Offsets that division and remainder make do not show this by themselves.
            pointers = tl.multiple_of(pointers, (1, VECTORS[i] * BYTES))
            pointers = tl.max_contiguous(pointers, (1, tl.constexpr(VECTORS[i])))
            valid = ((inside[:, None] >> taps[None, :]) & 1) != 0
            valid = tl.max_constancy(valid, (1, tl.constexpr(VECTORS[i])))
            a = tl.load(pointers, valid, other=0.0)
            b = tl.load(weight + (k[:, None] * COLUMNS + n[None, :]),
                        (k < TAPS * WIDTHS[i])[:, None] & (n < COLUMNS)[None, :], other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        weight += TAPS * WIDTHS[i] * COLUMNS
    total += tl.load(bias + n, n < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != "linear":
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "relu6":
        total = tl.minimum(total, 6.0, propagate_nan=tl.PropagateNan.ALL)
    pointers = out + first.to(tl.int64) * OUT_ROW + (m[:, None] * OUT_ROW + n[None, :])
    pointers = tl.multiple_of(pointers, (1, OUT_VECTOR * BYTES))
    valid = (pixel < pixels)[:, None] & (n < OUTPUTS)[None, :]
    tl.store(pointers, total.to(out.dtype.element_ty), valid)
