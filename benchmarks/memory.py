"""Memory that training keeps for the backward pass, with and without recomputed concatenations.

    python -m benchmarks.memory [--device cuda] [--size 512] [--amp off bf16] [--json OUT]

The claim (arXiv 1707.06990): a dense network's concatenations cost memory only, their parts are
there anyway. "kept" is what lies in memory for a picture between forward and backward pass, in
bytes of tensors, the same on every device: that of twice the pictures less that of --batch, per
picture. "peak" is the most memory of a whole step of --batch pictures: on a GPU of all tensors, on
the CPU of a process of its own. Steps with and without take turns, times are medians; the
gradients must be equal, bit by bit.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.timing import machine, medians, write
from data.config import INPUT_MEAN
from layers import MultiBoxLoss, PriorBox
from models import BACKBONES, build_net, prior_config
from utils.device import AMP_TYPES, autocast, to_input

CLASSES = 81


class Allocations(TorchDispatchMode):
    """Sees every tensor that operations make inside, and tells how much of it is still there."""

    def __init__(self):
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in given:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def nbytes(self) -> int:
        return sum(size for storage, size in self.made.values() if not storage.expired())


def _storages(tree) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def kept(net: nn.Module, images: Tensor, amp: str) -> int:
    """Bytes that a training forward pass leaves for the backward pass, outputs included."""
    with Allocations() as allocations, autocast(images.device, amp):
        outputs = net(images)
    size = allocations.nbytes()
    del outputs
    return size


def step_call(
    net: nn.Module, images: Tensor, priors: Tensor, amp: str, recompute: bool
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward pass, loss and backward pass; returns the gradients."""
    criterion = MultiBoxLoss(net.num_classes)
    target = torch.tensor([[0.1, 0.2, 0.5, 0.6, 1.0], [0.4, 0.4, 0.9, 0.8, 2.0]])

    def call() -> tuple[Tensor, ...]:
        net.recompute = recompute
        with autocast(images.device, amp):
            outputs = net(images)
        losses = criterion(outputs, priors, [target] * len(images))
        return torch.autograd.grad(sum(losses), list(net.parameters()))

    return call


def build(version: str, size: int, batch: int, device: torch.device):
    """(network, images, priors), the same for the same arguments."""
    torch.manual_seed(0)
    net = build_net(version, size, CLASSES).to(device, memory_format=torch.channels_last).train()
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    priors = PriorBox(prior_config(version, "COCO", size)).to(device)()
    return net, to_input(pixels, INPUT_MEAN, device), priors


def peak_rss(version: str, size: int, batch: int, amp: str, recompute: bool, threads: int) -> int:
    """Bytes, of a process that has done nothing else than one step (on Linux)."""
    torch.set_num_threads(threads)
    net, images, priors = build(version, size, batch, torch.device("cpu"))
    step_call(net, images, priors, amp, recompute)()
    # Not getrusage, which begins with the memory of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.M)[1]) * 1024


def peak(call: Callable[[], object], device: torch.device, *arguments: str | int | bool) -> int:
    """Most bytes of a step: of CUDA tensors by ``call``, else of a process, by ``peak_rss``."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(peak_rss, *arguments, torch.get_num_threads()).result()


def measure(
    version: str, size: int, batch: int, amp: str, device: torch.device, rounds: int
) -> dict[str, dict[str, float]]:
    """ "kept", "peak" (bytes) and "seconds" of "plain" and "recomputed" steps."""
    net, images, priors = build(version, size, 2 * batch, device)
    found: dict[str, dict[str, float]] = {"kept": {}, "peak": {}}
    modes = {"plain": False, "recomputed": True}
    for mode, recompute in modes.items():
        net.recompute = recompute
        more = kept(net, images, amp) - kept(net, images[:batch], amp)
        found["kept"][mode] = more / batch
    images = images[:batch].clone(memory_format=torch.preserve_format)
    calls = {
        mode: step_call(net, images, priors, amp, recompute) for mode, recompute in modes.items()
    }
    # Running statistics move with every pass, but training does not use them.
    gradients = [call() for call in calls.values()]
    if not all(map(torch.equal, *gradients)):
        raise AssertionError(f"{version} {amp}: recomputation gives other gradients")
    del gradients
    found["seconds"] = medians(calls, rounds, device, warm_up=1)
    for mode, recompute in modes.items():
        rest = (version, size, batch, amp, recompute)
        found["peak"][mode] = peak(calls[mode], device, *rest)
    return found


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--size", type=int, default=512)
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--amp", nargs="+", choices=AMP_TYPES, default=["off", "bf16"])
    p.add_argument(
        "--versions",
        nargs="+",
        choices=BACKBONES,
        default=["SSD_HarDNet68", "SSD_HarDNet85", "SSD_vgg"],
    )
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--json", type=Path, help="a file, or - for the last line of the output")
    args = p.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True  # or equal steps differ in their last bits
    print(f"{machine(device)}; {args.size} px, batch {args.batch}; MiB plain -> recomputed")
    rows = []
    for version in args.versions:
        for amp in args.amp:
            found = measure(version, args.size, args.batch, amp, device, args.rounds)
            shown = [
                f"{what} {values['plain'] / 2**20:7.1f} -> {values['recomputed'] / 2**20:7.1f} "
                f"(x{values['recomputed'] / values['plain']:.2f})"
                for what, values in found.items()
                if what != "seconds"
            ]
            seconds = found["seconds"]
            print(
                f"{version:15} {amp:4}  {',  '.join(shown)},  step {seconds['plain']:.3f} s "
                f"x{seconds['recomputed'] / seconds['plain']:.2f}",
                flush=True,
            )
            rows.append({"version": version, "amp": amp, **found})
    content = {"size": args.size, "batch": args.batch, "rows": rows}
    write(args.json, device, **content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
