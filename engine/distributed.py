"""Jobs of several processes: joining one that torchrun started, collective calls, starting one."""

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError, first_line
from utils.signals import ENDING, heeded

# Rank 0 scores a test set alone while the others wait for the next step. The limit is for a process
# that hangs; one that ended is noticed at once, by a closed connection or by torchrun.
TIMEOUT = timedelta(hours=2)

T = TypeVar("T")


class RankZeroFailed(Exception):
    """Raised on other ranks after rank 0 failed. Rank 0 has already reported the error."""


@dataclass(frozen=True)
class World:
    """The processes of a job, seen from one of them.

    It has number ``rank`` of ``size``, and ``local_rank`` of the ``local_size`` on its machine. All
    processes call the same methods in the same order. In a job of one process they cost nothing.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and reports for the job."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` over all processes, in place and without waiting for a GPU."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def decide(self, make: Callable[[], T]) -> T:
        """Call ``make`` on rank 0 and return its result, plain data, on every process.

        Raises:
            RankZeroFailed: on the other processes, when ``make`` raised on rank 0.
        """
        return self._first(make, shared=True)

    def in_turn(self, make: Callable[[], T]) -> T:
        """Call ``make`` on rank 0, then on the other processes; return each one's own result.

        A mistake that every process would meet is reported once. Raises as ``decide``.
        """
        made = self._first(make, shared=False)
        return made if self.main else make()

    def _first(self, make: Callable[[], T], shared: bool) -> T:
        """Call ``make`` on rank 0; tell the others its result, if ``shared``, or its failure."""
        if not self.main:
            outcome = json.loads(self._broadcast(" "))
            if "value" not in outcome:
                raise RankZeroFailed
            return outcome["value"]
        outcome = {}
        try:
            made = make()
            outcome = {"value": made if shared else None}
            return made
        finally:
            if self.size > 1:
                self._broadcast(json.dumps(outcome))

    def _broadcast(self, text: str) -> str:
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        length = torch.tensor([len(data)])
        dist.broadcast(length, 0)
        if not self.main:
            data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0)
        return bytes(data.tolist()).decode()

    def share_of(self, length: int) -> range:
        """Return this process's share of ``length`` items; each item has exactly one process."""
        return range(self.rank, length, self.size)

    def collect(self, detections: Sequence[Mapping[str, np.ndarray]],
                length: int) -> list[dict[str, np.ndarray]] | None:
        """Return the detections of all ``length`` images, in order, on rank 0; None on the others.

        Args:
            detections: of the images ``share_of(length)``, each {"boxes" float32 [n, 4],
                "scores" float32 [n], "labels" int64 [n]}.
        """
        if self.size == 1:
            return list(detections)
        empty = {"boxes": np.empty((0, 4), np.float32), "scores": np.empty(0, np.float32),
                 "labels": np.empty(0, np.int64)}
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
        """Return the rows of each process. They travel as bytes, so any dtype is possible."""
        data = torch.from_numpy(np.ascontiguousarray(rows).view(np.uint8).reshape(-1))
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]))
        padded = torch.zeros(int(max(lengths)), dtype=torch.uint8)
        padded[: len(data)] = data
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded)
        return [g[: int(n)].numpy().view(rows.dtype).reshape(-1, *rows.shape[1:])
                for g, n in zip(gathered, lengths, strict=True)]

    def replicate(self, net: nn.Module, device: torch.device) -> nn.Module:
        """Return ``net`` with rank 0's weights and with gradients averaged over the processes."""
        if self.size == 1:
            return net
        where = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(net, device_ids=where, gradient_as_bucket_view=True)

    def share_statistics(self, net: nn.Module) -> None:
        """Copy rank 0's buffers to every process: running batch statistics may differ."""
        if self.size > 1:
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)


SINGLE_PROCESS = World()


def no_sync(net: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return the context of a backward pass whose gradients a later one will average."""
    if isinstance(net, DistributedDataParallel):
        return net.no_sync()
    return contextlib.nullcontext()


def join() -> World:
    """Join the job that torchrun started, as its variables (``RANK``, ``WORLD_SIZE``, ...) say.

    Without them the job has one process. Tensors on GPUs travel by NCCL, others by gloo.

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
            # torchrun may keep its store over a restart, with the addresses of ended processes
            # (PyTorch issue 135712). On several machines the restart count does not help.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except RuntimeError as error:
        raise UserError(f"the processes of the job cannot reach each other ({first_line(error)}); "
                        "if torchrun has restarted them on several machines, give it "
                        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment "
                        "(docs/many_gpus.md)") from error
    return world


def leave() -> None:
    """Undo ``join``."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end(status: int) -> NoReturn:
    """End this process with an exit status.

    A process that fails within a job ends at once. During a regular exit the threads of gloo, still
    connected, may abort the process, and its status would be lost.
    """
    if not dist.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


_LOST_PEER = re.compile(
    "connection closed|connection reset|broken pipe|ncclRemoteError|communicator was aborted",
    re.IGNORECASE,
)
"""Words of gloo and NCCL when another process has ended; they have no exception type for it."""


def is_lost_connection(error: BaseException) -> bool:
    """Return whether ``error`` says that another process of the job has ended.

    A misuse of NCCL or CUDA does not count. Report the text of the error in both cases.
    """
    if isinstance(error, ConnectionError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None


def launched() -> bool:
    """Return whether torchrun or ``launch`` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(processes: int, program: Sequence[str]) -> int:
    """Run a Python program as a job of several processes on this machine; return its exit status.

    This is ``torchrun --standalone --nproc-per-node N`` without its traceback, and with the status
    of the process that failed first; 128 + n if signal n ended it. SIGINT, SIGTERM and SIGHUP are
    passed on; the processes then have 30 seconds to save their state. Signal handlers stay
    replaced. ``program`` has the arguments of the Python interpreter.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if processes > 1:  # as torchrun does, with a warning; else every process would use all cores
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    job = ["--standalone", "--nproc-per-node", str(processes), "--no-python", sys.executable]
    arguments = run.parse_args([*job, *program])
    names = [number.name for number in heeded((signal.SIGINT, *ENDING))]
    arguments.signals_to_handle = ",".join(names)  # not the SIGHUP that nohup ignores
    try:
        run.run(arguments)
        return 0
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException:
        return 130


def check_sync_bn(device: torch.device, size: int) -> None:
    """Raise UserError for ``--sync_bn`` in a job of several processes on the CPU."""
    if size > 1 and device.type != "cuda":
        raise UserError(f"--sync_bn needs GPUs, but the {size} processes of the job use the CPU; "
                        "give --sync_bn false")


def check_shares(batch_size: int, size: int, accumulate: int) -> None:
    """Raise UserError unless a batch divides evenly among processes and accumulation steps."""
    if batch_size % (size * accumulate):
        raise UserError(f"--batch_size {batch_size} is the batch of all {size} processes with "
                        f"{accumulate} accumulation steps; give a multiple of {size * accumulate} "
                        "(docs/many_gpus.md)")
