"""A job from start to exit status: processes, signals, logging, and error messages."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence

import torch

from engine.distributed import (
    SINGLE_PROCESS,
    RankZeroFailed,
    World,
    is_lost_connection,
    join,
    launch,
    launched,
    leave,
)
from engine.options import Call, parse
from utils.console import console, printable
from utils.device import choose_device, full_memory
from utils.errors import UserError, first_line, reason
from utils.logger import close_logging, setup_logging
from utils.signals import Interrupted, TimeUp, interruptible

Work = Callable[[Call, Mapping[str, object], World], None]


@console()
@interruptible()
def run_job(program: str, argv: Sequence[str] | None, train: Work, test: Work) -> int:
    """Parse the command line, join the job's other processes, work, and return the exit status.

    0: done. 1: unexpected failure. 2: bad usage or bad input. 130: interrupted, state saved.

    Args:
        program: the file that --ngpu starts once a GPU.
        argv: arguments; None: those of this process.
        train, test: called with the call, the options that are given, and the processes.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    setup_logging()
    # Nearly all batches have one shape, so cuDNN's search for the fastest algorithm pays.
    torch.backends.cudnn.benchmark = True
    world, call = SINGLE_PROCESS, None
    try:
        call, given = parse(argv)
        if call.ngpu is not None:
            check_gpus(call.ngpu, choose_device(call.device_name()))
            if call.ngpu > 1 and not launched():
                return launch(call.ngpu, [program, *argv])
        world = join()
        if not world.main:
            setup_logging(quiet=True)
        (test if call.test else train)(call, given, world)
        leave()
        return 0
    except BaseException as error:
        told = _told(error, world, resumable=call is not None and call.test is None)
        if told is None:
            raise
        status, text = told
        if text := printable(text):
            print(text if world.main else f"[process {world.rank}] {text}", file=sys.stderr)
        return status
    finally:
        close_logging()


def check_gpus(ngpu: int, device: torch.device) -> None:
    """Refuse an --ngpu that cannot share a batch on this machine.

    Raises:
        UserError: torchrun started another number of processes, or PyTorch sees fewer GPUs.
    """
    if launched() and ngpu != int(os.environ["LOCAL_WORLD_SIZE"]):
        raise UserError(f"--ngpu {ngpu} contradicts torchrun, which has started "
                        f"{os.environ['LOCAL_WORLD_SIZE']} processes here; leave the option out")
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if ngpu > max(gpus, 1):
        raise UserError(f"--ngpu {ngpu} on {device}: PyTorch sees {gpus} GPUs; give fewer")
    if ngpu > 1 and device.index:
        raise UserError(f"--ngpu {ngpu} uses the first GPUs; leave --device {device} out")


def _told(error: BaseException, world: World, resumable: bool) -> tuple[int, str] | None:
    """Return exit status and message for an error that a user can act on, None for any other."""
    if isinstance(error, UserError):
        return 2, f"error: {error}"
    if isinstance(error, RankZeroFailed):
        return 2, ""
    if isinstance(error, TimeUp):  # as asked for; the state is saved, and the log says how to go on
        return 0, ""
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return 130, "interrupted" if world.main else ""
    if memory := full_memory(error):
        return 1, (
            f"error: {memory} is full ({first_line(error)}); give a smaller --batch_size, "
            "or with the same one --accumulate, --recompute or --amp bf16"
        )
    if world.size > 1 and is_lost_connection(error):
        advice = "; start it again with --resume auto" if resumable else ""
        told = f"another process of the job has ended ({first_line(error)})"
        return 1, f"error: {told}{advice}"
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        return 2, f"error: {reason(error)}"
    return None
