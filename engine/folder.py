"""The folder of a run: its checkpoints, its log, and where everything is."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from engine.options import Options
from utils.checkpoint import save_checkpoint
from utils.errors import UserError
from utils.files import atomic_write, locked, write_json
from utils.logger import LOGGER, setup_logging

KEPT = {
    "best weights": "best.pth", "to continue from": "last.pth", "log": "train.log",
    "log for programs": "log.jsonl", "configuration": "config.json",
    "curves (tensorboard --logdir)": "tensorboard", "scores and detections": "ss_predict",
}
"""What a run leaves beside its final weights: description -> name."""


class RunFolder:
    """The files of a training run. Only rank 0 writes them.

    Args of the constructor:
        path: the folder; it exists.
        options: of the run; they name the kept checkpoints.
        writes: whether this process writes.
    """

    def __init__(self, path: Path, options: Options, writes: bool = True):
        self.path = path
        self.options = options
        self.writes = writes

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def final(self) -> str:
        """Name of the checkpoint of the last step."""
        return f"Final_{self.options.version}_{self.options.dataset}.pth"

    def at_epoch(self, epoch: int) -> str:
        """Return the name of the checkpoint that is kept of an epoch."""
        return f"{self.options.version}_{self.options.dataset}_epoches_{epoch}.pth"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder against other processes, and log into it.

        Raises:
            UserError: another process trains in the folder.
        """
        if not self.writes:
            yield
            return
        with locked(self / ".lock", "--date"):
            setup_logging(self / "train.log")
            yield

    def save_options(self, options: Options) -> None:
        """Write config.json."""
        if self.writes:
            write_json(self / "config.json", options.plain())

    def save(self, state: Mapping[str, object], *names: str) -> None:
        """Write ``state`` under every name; the last.pth before it becomes previous.pth.

        Raises:
            UserError: a tensor of the network is not finite, or a file cannot be written.
        """
        broken = [key for key, tensor in state["model"].items() if not tensor.isfinite().all()]
        if broken:
            raise UserError(f"{len(broken)} tensors of the network are not finite at step "
                            f"{state['step']} (e.g. {broken[0]}); {self.last_good()}; lower --lr")
        for name in names:
            previous = self / "previous.pth" if name == "last.pth" else None
            save_checkpoint(self / name, state, previous)

    def last_good(self) -> str:
        """Return where the last checkpoint is, for messages."""
        last = self / "last.pth"
        return f"the last good checkpoint is {last}" if last.exists() else "nothing was saved yet"

    def summarise(self) -> None:
        """Log the place of every file that the run has left."""
        for what, name in {"last weights": self.final, **KEPT}.items():
            if (self / name).exists():
                LOGGER.info("  %-30s %s", what, self / name)


class RunLog:
    """The file ``log.jsonl`` of a run, one JSON object per epoch."""

    def __init__(self, directory: Path, history: list[dict], write: bool = True) -> None:
        """Begin with the lines of a resumed run. ``write``: False leaves it to another process."""
        self.path = directory / "log.jsonl" if write else None
        self._waiting = b""
        if self.path:
            with atomic_write(self.path) as file:
                file.writelines(f"{json.dumps(line)}\n".encode() for line in history)

    def add(self, record: dict) -> None:
        """Add a line; on a full disk it waits for the next call."""
        if not self.path:
            return
        self._waiting += f"{json.dumps(record)}\n".encode()
        try:
            with open(self.path, "ab", buffering=0) as file:  # which tells how much it has written
                self._waiting = self._waiting[file.write(self._waiting) :]
        except OSError as error:
            LOGGER.warning("%s cannot be written (%s); make room", self.path, error)
