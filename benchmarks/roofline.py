"""What a device can do at best, measured, and the shares of it that a network reaches."""

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import race, set_tf32
from tools.traffic import Profile

TYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16,
         "fp16": torch.float16, "int8": torch.int8}
"""Precision -> dtype of its elements."""
CELLS = 64


def measure(device: torch.device, rounds: int = 10, scale: float = 1) -> dict:
    """Return the device's limits, medians over the rounds; ``scale`` makes them small for a test.

    "bandwidth": bytes a second, read and written, of a copy. "operations": by precision,
    multiplications and additions a second of a product of two square matrices or of a 3x3
    convolution, whichever is faster: some CPUs reach half the rate in one of them.
    """
    gpu = device.type == "cuda"
    source = torch.ones(int((4 if gpu else 1) * scale * 2**28), dtype=torch.uint8, device=device)
    calls: dict = {"copy": partial(torch.zeros_like(source).copy_, source)}
    side, channels = (int(x * scale) for x in ((8192, 1024) if gpu else (1536, 256)))
    for precision, dtype in TYPES.items():
        if not gpu and precision in ("tf32", "fp16"):
            continue
        matrices = [(3 * torch.rand(side, side, device=device)).to(dtype) for _ in "ab"]
        calls["product", precision] = partial(_product, precision, *matrices)
        if precision != "int8" or not gpu:
            shapes = (1, channels, CELLS, CELLS), (channels, channels, 3, 3)
            images, weight = (torch.rand(shape, device=device).contiguous(
                memory_format=torch.channels_last) for shape in shapes)
            calls["convolution", precision] = (
                _quantised_convolution(images, weight) if precision == "int8" else
                partial(_convolution, precision, images.to(dtype), weight.to(dtype)))
    seconds, _ = race(calls, rounds, device)
    moved, rates = 2 * len(source) / seconds.pop("copy"), dict.fromkeys(TYPES, 0.0)
    work = {"product": 2 * side**3, "convolution": 2 * 9 * channels**2 * CELLS**2}
    for (kind, precision), taken in seconds.items():
        rates[precision] = max(rates[precision], work[kind] / taken)
    return {"bandwidth": moved, "operations": {key: rate for key, rate in rates.items() if rate}}


def _product(precision: str, a: Tensor, b: Tensor) -> Tensor:
    set_tf32(precision)
    return torch._int_mm(a, b.t()) if precision == "int8" else a @ b


@torch.inference_mode()
def _convolution(precision: str, images: Tensor, weight: Tensor) -> Tensor:
    set_tf32(precision)
    return torch.conv2d(images, weight, padding=1)


def _quantised_convolution(images: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """Return a convolution of values in 0..1 in INT8, by PyTorch's own kernels for the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these types are announced to go
        images = torch.quantize_per_tensor(images, 1 / 255, 0, torch.quint8)
        weight = torch.quantize_per_tensor(weight, 1 / 127, 0, torch.qint8)
    packed = torch.ops.quantized.conv2d_prepack(weight, None, [1, 1], [1, 1], [1, 1], 1)
    return partial(torch.ops.quantized.conv2d, images, packed, 1.0, 0)


def shares(counted: Profile, batch: int, precision: str, seconds: float,
           limits: dict) -> dict[str, float]:
    """Return the shares of `measure`'s limits that a forward pass of ``batch`` images reaches.

    "bandwidth" counts inputs and outputs of convolutions, concatenations, copies and sums of every
    image, and parameters once a batch. Data that stay in a cache count too, so it can exceed 1.
    "operations" is left out if that precision was not measured.
    """
    moved = (counted.traffic + counted.sums) * batch + counted.parameters
    found = {"bandwidth": moved * TYPES[precision].itemsize / seconds / limits["bandwidth"]}
    if precision in limits["operations"]:
        rate = 2 * counted.macs * batch / seconds
        found["operations"] = rate / limits["operations"][precision]
    return found
