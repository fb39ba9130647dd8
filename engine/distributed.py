"""Several processes that train or test as one (torchrun's), and how ``--ngpu`` starts them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError

# Rank 0 scores a test set alone while the others wait for the next step. A process that ended is
# noticed at once, by a closed connection or by torchrun: the limit is only for one that hangs.
TIMEOUT = timedelta(hours=2)


T = TypeVar("T")


class Elsewhere(Exception):
    """Rank 0 has failed, and has said why: this process ends without a word of its own."""


@dataclass(frozen=True)
class World:
    """The processes of a job: this one is number ``rank`` of ``size``, and ``local_rank`` of the
    ``local_size`` on its machine.

    Every method is called by all processes alike; in a job of one process they cost nothing.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks for the job."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor`` summed over all processes, in place and without waiting for a GPU."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def decide(self, make: Callable[[], object]):
        """What ``make()`` returns on rank 0 (plain data), on every process.

        Raises:
            Elsewhere: on the other processes, when ``make()`` raised on rank 0.
        """
        if self.size == 1:
            return make()
        if not self.main:
            outcome = json.loads(self._broadcast(None))
            if "value" not in outcome:
                raise Elsewhere
            return outcome["value"]
        try:
            value = make()
        except BaseException:
            self._broadcast("{}")
            raise
        self._broadcast(json.dumps({"value": value}))
        return value

    def in_turn(self, make: Callable[[], T]) -> T:
        """``make()`` on rank 0, and when that has not raised, on the other processes.

        So a mistake that every process would meet is told once.

        Raises:
            Elsewhere: on the other processes, when ``make()`` raised on rank 0.
        """
        made: list[T] = []

        def first() -> None:
            made.append(make())

        self.decide(first)
        return made[0] if made else make()

    def _broadcast(self, text: str | None) -> str:
        data = torch.frombuffer(bytearray((text or " ").encode()), dtype=torch.uint8)
        length = torch.tensor([len(data)])
        dist.broadcast(length, 0)
        if not self.main:
            data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0)
        return bytes(data.tolist()).decode()

    def share_of(self, length: int) -> range:
        """Which of ``length`` things this process works on: each goes to exactly one process."""
        return range(self.rank, length, self.size)

    def collect(
        self, detections: Sequence[Mapping[str, np.ndarray]], length: int
    ) -> list[dict[str, np.ndarray]] | None:
        """Detections of all ``length`` pictures, in order, on rank 0; None on the others.

        Args:
            detections: those of this process's ``share_of(length)``, one {"boxes" float32 [n, 4],
                "scores" float32 [n], "labels" int64 [n]} a picture.
        """
        if self.size == 1:
            return list(detections)
        empty = {
            "boxes": np.empty((0, 4), np.float32),
            "scores": np.empty(0, np.float32),
            "labels": np.empty(0, np.int64),
        }
        parts = [self._gather(np.array([len(d["scores"]) for d in detections], np.int64))]
        for key, none in empty.items():
            parts.append(self._gather(np.concatenate([none, *(d[key] for d in detections)])))
        if not self.main:
            return None
        collected: list[dict[str, np.ndarray]] = [{}] * length
        for rank, (counts, *arrays) in enumerate(zip(*parts, strict=True)):
            ends = np.cumsum(counts)[:-1]
            split = [np.split(array, ends) for array in arrays]
            for number, index in enumerate(range(rank, length, self.size)):
                rows = (array[number] for array in split)
                collected[index] = dict(zip(empty, rows, strict=True))
        return collected

    def _gather(self, rows: np.ndarray) -> list[np.ndarray]:
        """Each process's rows, of one type and width; they go as bytes, so any type may be."""
        data = torch.from_numpy(np.ascontiguousarray(rows).view(np.uint8).reshape(-1))
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]))
        padded = torch.zeros(int(max(lengths)), dtype=torch.uint8)
        padded[: len(data)] = data
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded)
        return [
            g[: int(n)].numpy().view(rows.dtype).reshape(-1, *rows.shape[1:])
            for g, n in zip(gathered, lengths, strict=True)
        ]

    def replicate(self, net: nn.Module, device: torch.device) -> nn.Module:
        """``net`` as a replica whose gradients are averaged over the processes, which start from
        rank 0's weights."""
        if self.size == 1:
            return net
        where = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(net, device_ids=where, gradient_as_bucket_view=True)

    def share_statistics(self, net: nn.Module) -> None:
        """Give ``net`` rank 0's buffers on every process; those of batch statistics may differ."""
        if self.size > 1:
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)


ALONE = World()
"""A job of one process."""


def no_sync(net: nn.Module):
    """The context of a backward pass whose gradients are not averaged yet: more are to come."""
    if isinstance(net, DistributedDataParallel):
        return net.no_sync()
    return contextlib.nullcontext()


def join() -> World:
    """Take part in the job that torchrun started; a job of one where it did not.

    Its variables (``RANK``, ``WORLD_SIZE``, ...) tell. Tensors of GPUs travel by NCCL, others by
    gloo.

    Raises:
        UserError: the processes cannot reach each other.
    """
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    world = World(*(int(os.environ.get(name, default)) for name, default in names.items()))
    if world.size == 1:
        return world
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        if world.local_size == size:
            # torchrun may keep its store over a restart, with the addresses of processes that are
            # gone (PyTorch issue 135712). Over several machines the count tells them nothing.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except RuntimeError as error:
        raise UserError(
            f"the processes of the job cannot reach each other ({str(error).splitlines()[0]}); if "
            "torchrun has restarted them on several machines, give it "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment (docs/many_gpus.md)"
        ) from error
    return world


def leave() -> None:
    """Undo ``join``."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end(status: int) -> NoReturn:
    """End this process with an exit status.

    One that fails in the midst of a job ends at once: while it is taken down, gloo's threads, still
    connected, may abort it, and the status would be lost.
    """
    if not dist.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective call failed, as it does when another process has ended."""
    known = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in known)
    )


def launched() -> bool:
    """Whether torchrun, or ``launch``, has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(processes: int, program: Sequence[str]) -> int:
    """Run a Python program as a job of ``processes`` on this machine; returns its exit status.

    ``program``: the arguments of the interpreter. It is what ``torchrun --standalone
    --nproc-per-node N`` does, without its traceback. SIGINT and SIGTERM are handed on, and the
    processes have 30 seconds to save their state.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")  # the launcher's handlers stay otherwise
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    # As torchrun: without it every process would take all cores.
    threads_unset = processes > 1 and "OMP_NUM_THREADS" not in os.environ
    if threads_unset:
        os.environ["OMP_NUM_THREADS"] = "1"
    try:
        elastic_launch(config, sys.executable)(*program)
        return 0
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        # Negative: it was ended by that signal.
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException:
        return 130
    finally:
        if threads_unset:
            del os.environ["OMP_NUM_THREADS"]
        for number, handler in handlers.items():
            signal.signal(number, handler)


class CPUSyncBatchNorm(nn.BatchNorm2d):
    """Batch normalisation with the statistics of all processes' pictures, on the CPU.

    Like ``nn.SyncBatchNorm``, which is for GPUs only. [B, C, H, W] -> the same, of any float type;
    the statistics are in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        local = torch.cat([values.sum((0, 2, 3)), values.new_tensor([x.numel() / x.shape[1]])])
        total = _SumOverProcesses.apply(local)
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = values - mean[:, None, None]
        variance = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class _SumOverProcesses(torch.autograd.Function):
    """The sum over all processes, which every one of them uses: so its gradient is a sum, too."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def synchronise_batch_norm(net: nn.Module, device: torch.device) -> nn.Module:
    """``net`` with every batch normalisation replaced by one over all processes' pictures.

    Parameters, buffers and keys of the state dict stay.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = CPUSyncBatchNorm  # it adds no state
    return net


def check_shares(batch_size: int, size: int, accumulate: int) -> None:
    """UserError unless a batch can be cut evenly into a part a process and accumulation step."""
    if batch_size % (size * accumulate):
        raise UserError(
            f"--batch_size {batch_size} is the batch of all {size} processes with {accumulate} "
            f"accumulation steps; give a multiple of {size * accumulate} (docs/many_gpus.md)"
        )
