"""The device and the precision that a network runs in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

AMP_TYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def to_input(images: Tensor, mean: Sequence[float], device: torch.device) -> Tensor:
    """uint8 [B, 3, S, S] -> float32 on the device, minus the per-channel mean, channels last."""
    images = images.to(device, non_blocking=True).float()
    # Filled on the device: a copy from the host would wait for it.
    for channel, value in zip(images.unbind(1), mean, strict=True):
        channel -= value
    return images.contiguous(memory_format=torch.channels_last)


def autocast(device: torch.device, amp: str):
    """The context in which a network runs at precision ``amp`` (a key of ``AMP_TYPES``)."""
    dtype = AMP_TYPES[amp]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
