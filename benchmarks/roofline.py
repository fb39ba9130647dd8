"""What a device can do at best, measured: memory bandwidth and matrix products a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.timing import medians
from tools.traffic import Profile

BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "int8": 1}
"""Bytes of an element, by precision."""
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}

# Bytes of a buffer: far more than any cache, and so few that it and its copy stay in one.
LARGE = {"cpu": 256 << 20, "cuda": 1 << 30}
SMALL = {"cpu": 256 << 10, "cuda": 8 << 20}
SIDE = {"cpu": 1536, "cuda": 8192}
CHANNELS = {"cpu": 256, "cuda": 1024}
CELLS = 64
REPEATS = 100  # of what is short, so that calling it does not count


@contextmanager
def tensor_float(allowed: bool) -> Iterator[None]:
    """Whether a GPU may compute float32 in TF32, within the block."""
    flags = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = allowed
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def ceilings(device: torch.device, rounds: int = 10, scale: float = 1) -> dict:
    """Medians over some rounds.

    Args:
        scale: of the sizes, for a test.

    Returns:
        "bandwidth" and "bandwidth_in_cache": bytes a second, read and written, of a copy;
        "operations": multiplications and additions a second, by precision, of a product of two
        square matrices, or of a 3x3 convolution where that is faster: on some CPUs PyTorch's
        library for float32 products reaches less than half of the one for convolutions. fp16,
        which networks have on GPUs alone, is left out on the CPU.
    """
    large, small = (_copying(int(sizes[device.type] * scale), device) for sizes in (LARGE, SMALL))
    side = int(SIDE[device.type] * scale) // 32 * 32
    left_out = () if device.type == "cuda" else ("tf32", "fp16")
    products = {x: _multiplying(x, side, device) for x in BYTES if x not in left_out}
    channels = max(int(CHANNELS[device.type] * scale), 1)
    convolutions = {x: _convolving(x, channels, device) for x in products if x != "int8"}
    calls = {"large": large, "small": lambda: [small() for _ in range(REPEATS)], **products}
    calls |= {f"convolution {x}": call for x, call in convolutions.items()}
    seconds = medians(calls, rounds, device)
    rates = {x: 2 * side**3 / seconds[x] for x in products}
    for x in convolutions:
        operations = 2 * 9 * channels**2 * CELLS**2
        rates[x] = max(rates[x], operations / seconds[f"convolution {x}"])
    return {
        "bandwidth": 2 * int(LARGE[device.type] * scale) / seconds["large"],
        "bandwidth_in_cache": 2 * int(SMALL[device.type] * scale) * REPEATS / seconds["small"],
        "operations": rates,
    }


def _copying(size: int, device: torch.device) -> Callable[[], object]:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def _convolving(precision: str, channels: int, device: torch.device) -> Callable[[], object]:
    x = torch.rand(1, channels, CELLS, CELLS, device=device).to(TYPES.get(precision))
    weight = torch.rand(channels, channels, 3, 3, device=device).to(TYPES.get(precision))
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))

    def call() -> None:
        with tensor_float(precision == "tf32"), torch.inference_mode():
            torch.conv2d(x, weight, padding=1)

    return call


def _multiplying(precision: str, side: int, device: torch.device) -> Callable[[], object]:
    if precision == "int8":
        a, b = (torch.ones(side, side, dtype=torch.int8, device=device) for _ in range(2))
        return lambda: torch._int_mm(a, b.t())  # the layout that GPUs want
    a, b = (torch.rand(side, side, device=device).to(TYPES.get(precision)) for _ in range(2))

    def call() -> None:
        with tensor_float(precision == "tf32"):
            a @ b

    return call


def shares(
    counted: Profile, batch: int, precision: str, seconds: float, ceiling: dict
) -> dict[str, float]:
    """How much of a device's ceilings a forward pass reaches.

    Args:
        counted: of one image. Bytes are those of its convolutions' inputs and outputs, of its
            concatenations, copies and sums, and, once a batch, of its parameters; what stays in a
            cache counts, so the share of the bandwidth can be over 1.
        ceiling: of ``ceilings``.

    Returns:
        "operations", if the product was measured in that precision, and "bandwidth".
    """
    moved = ((counted.traffic + counted.sums) * batch + counted.parameters) * BYTES[precision]
    found = {"bandwidth": moved / seconds / ceiling["bandwidth"]}
    if precision in ceiling["operations"]:
        rate = 2 * counted.macs * batch / seconds
        found["operations"] = rate / ceiling["operations"][precision]
    return found
