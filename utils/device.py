"""The device and the precision that a network runs in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.errors import UserError

AMP_TYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Values of ``amp`` -> the dtype of ``torch.autocast``, None for full precision."""


def choose_device(name: str = "auto", amp: str = "off",
                  local_rank: int | None = None) -> torch.device:
    """Return the device called ``name``. The current CUDA device stays as it is.

    Args:
        name: "auto" (a CUDA GPU if PyTorch sees one, else Apple's, else the CPU), "cpu", "cuda",
            "cuda:N" or "mps" (Apple's GPU; no test has run on one).
        amp: a key of ``AMP_TYPES``.
        local_rank: the GPU of this process in a job of several processes, None in a job of one.

    Raises:
        UserError: an unknown name, a GPU that PyTorch does not see, one GPU for several processes,
            or fp16 without a CUDA GPU.
    """
    apple = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if apple else "cpu"
    kind, _, index = name.partition(":")
    if not (name in ("cpu", "mps") or (kind == "cuda" and (name == kind or index.isdecimal()))):
        raise UserError(f"--device {name} is unknown; give auto, cpu, cuda, cuda:N or mps")
    if amp == "fp16" and kind != "cuda":
        raise UserError("--amp fp16 needs a CUDA GPU; use --amp bf16 elsewhere")
    if kind == "cpu":
        return torch.device("cpu")
    if local_rank is not None:
        if kind == "mps":
            raise UserError("--device mps serves one process; use --device cpu for several")
        if index:
            raise UserError(f"--device {name} is one GPU for several processes; leave it out")
        name, index = f"cuda:{local_rank}", str(local_rank)
    if kind == "mps":
        if not apple:
            raise UserError(f"--device mps is not there: PyTorch {torch.__version__} sees no Apple "
                            "GPU; use --device cpu")
        return torch.device("mps")
    gpus = torch.cuda.device_count()
    if int(index or 0) >= gpus:
        raise UserError(f"--device {name} is not there: PyTorch {torch.__version__} sees {gpus} "
                        "GPUs; use --device cpu")
    return torch.device(name)


def full_memory(error: BaseException) -> str:
    """Return the memory that ``error`` says is full, such as "main memory"; "" for other errors."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory"
    # PyTorch has no type for main memory.
    full = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return "main memory" if full or isinstance(error, MemoryError) else ""


def to_input(images: Tensor, mean: Sequence[float], device: torch.device) -> Tensor:
    """uint8 [B, 3, S, S] -> float32 on the device, minus the per-channel mean, channels last."""
    images = images.to(device, non_blocking=device.type == "cuda").float()
    # Filled on the device: a copy from the host would wait for it.
    for channel, value in zip(images.unbind(1), mean, strict=True):
        channel -= value
    return images.contiguous(memory_format=torch.channels_last)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Return the context in which a network runs at precision ``amp`` (a key of ``AMP_TYPES``)."""
    dtype = AMP_TYPES[amp]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
