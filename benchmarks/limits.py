"""What a device can do at best, measured, and the shares of it that a network reaches."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import race
from tools.traffic import Profile

TYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16,
         "fp16": torch.float16, "int8": torch.int8}  # precision -> dtype of its elements
LARGE = {"cpu": 256 << 20, "cuda": 1 << 30}  # bytes of a buffer that exceeds every cache
SIDE = {"cpu": 1536, "cuda": 8192}
CHANNELS = {"cpu": 256, "cuda": 1024}
CELLS = 64


@contextmanager
def tensor_float(allowed: bool) -> Iterator[None]:
    """Within the block, a GPU may compute float32 in TF32 or may not."""
    flags = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = allowed
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def measure(device: torch.device, rounds: int = 10, scale: float = 1) -> dict:
    """Return the device's limits, medians over the rounds; ``scale`` makes them small for a test.

    "bandwidth": bytes a second, read and written, of a copy. "operations": by precision,
    multiplications and additions a second of a product of two square matrices or of a 3x3
    convolution, whichever is faster: some CPUs reach half the rate in one of them.
    """
    kind = device.type
    source = torch.ones(int(LARGE[kind] * scale), dtype=torch.uint8, device=device)
    calls: dict = {"copy": partial(torch.zeros_like(source).copy_, source)}
    side, channels = int(SIDE[kind] * scale) // 32 * 32, int(CHANNELS[kind] * scale)
    for precision, dtype in TYPES.items():
        if kind == "cpu" and precision in ("tf32", "fp16"):
            continue
        matrices = [(3 * torch.rand(side, side, device=device)).to(dtype) for _ in "ab"]
        calls["product", precision] = partial(_product, precision, *matrices)
        if precision != "int8":
            shapes = (1, channels, CELLS, CELLS), (channels, channels, 3, 3)
            tensors = [torch.rand(shape, device=device).to(dtype) for shape in shapes]
            tensors = [x.contiguous(memory_format=torch.channels_last) for x in tensors]
            calls["convolution", precision] = partial(_convolution, precision, *tensors)
    seconds, _ = race(calls, rounds, device)
    work = {"product": 2 * side**3, "convolution": 2 * 9 * channels**2 * CELLS**2}
    rates: dict[str, float] = {}
    for call, taken in seconds.items():
        if call != "copy":
            rates[call[1]] = max(rates.get(call[1], 0), work[call[0]] / taken)
    return {"bandwidth": 2 * len(source) / seconds["copy"], "operations": rates}


def _product(precision: str, a: Tensor, b: Tensor) -> Tensor:
    with tensor_float(precision == "tf32"):
        return torch._int_mm(a, b.t()) if precision == "int8" else a @ b


@torch.inference_mode()
def _convolution(precision: str, images: Tensor, weight: Tensor) -> Tensor:
    with tensor_float(precision == "tf32"):
        return torch.conv2d(images, weight, padding=1)


def shares(counted: Profile, batch: int, precision: str, seconds: float,
           limits: dict) -> dict[str, float]:
    """Return the shares of `measure`'s limits that a forward pass of ``batch`` images reaches.

    "bandwidth" counts inputs and outputs of convolutions, concatenations, copies and sums of every
    image, and parameters once a batch. Data that stay in a cache count too, so it can exceed 1.
    "operations" is left out if that precision was not measured.
    """
    moved = (counted.traffic + counted.sums) * batch + counted.parameters
    moved *= TYPES[precision].itemsize
    found = {"bandwidth": moved / seconds / limits["bandwidth"]}
    if precision in limits["operations"]:
        rate = 2 * counted.macs * batch / seconds
        found["operations"] = rate / limits["operations"][precision]
    return found
