"""Trackers that a run sends its numbers and images to. Its own ``log.jsonl`` does not need them."""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from utils.errors import first_line, import_package
from utils.logger import LOGGER

PROJECT = "SSD-HarDNet"  # name under which a tracker files the runs


class Tracker(Protocol):
    """One tracker of one run. Its methods may raise anything."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take numbers by their names."""

    def image(self, step: int, name: str, rgb: np.ndarray) -> None:
        """Take an image, uint8 [H, W, 3]."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Writes into ``tensorboard/`` of the run's folder."""

    def __init__(self, folder: Path, config: Mapping[str, object]) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        self.writer = module.SummaryWriter(folder / "tensorboard")
        self.close = self.writer.close

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, rgb: np.ndarray) -> None:
        self.writer.add_image(name, rgb, step, dataformats="HWC")


class Wandb:
    """Weights & Biases, and trackio, which has the same functions.

    A resumed run goes on under its name. Offline: WANDB_MODE=offline; trackio is local by default.
    """

    def __init__(self, package: str, folder: Path, config: Mapping[str, object]) -> None:
        self.module = importlib.import_module(package)
        where = {"dir": str(folder), "id": folder.name} if package == "wandb" else {}
        self.module.init(project=PROJECT, name=folder.name, config=dict(config), resume="allow",
                         **where)
        self.close = self.module.finish

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.module.log(dict(values), step=step)

    def image(self, step: int, name: str, rgb: np.ndarray) -> None:
        self.module.log({name: self.module.Image(rgb)}, step=step)


class MLflow:
    """MLflow, in ``mlflow.db`` and ``mlruns/`` of the run's folder, or at MLFLOW_TRACKING_URI."""

    def __init__(self, folder: Path, config: Mapping[str, object]) -> None:
        self.module = importlib.import_module("mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            folder = folder.absolute()
            self.module.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').as_posix()}")
            if self.module.get_experiment_by_name(PROJECT) is None:
                self.module.create_experiment(PROJECT, (folder / "mlruns").as_uri())
        self.module.set_experiment(PROJECT)
        self.module.start_run(run_name=folder.name)
        self.module.log_params({key: str(value)[:500] for key, value in config.items()})
        self.close = self.module.end_run

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        # Its names may not hold every character.
        self.module.log_metrics({_plain(name): value for name, value in values.items()}, step)

    def image(self, step: int, name: str, rgb: np.ndarray) -> None:
        self.module.log_image(rgb, key=_plain(name), step=step)


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_./ " else "_" for c in name)


TRACKERS: dict[str, Callable[[Path, Mapping[str, object]], Tracker]] = {
    "tensorboard": TensorBoard, "wandb": partial(Wandb, "wandb"), "mlflow": MLflow,
    "trackio": partial(Wandb, "trackio"),
}
"""Values of --log, which are also the names of the packages, and the trackers."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError unless the packages of all trackers can be imported."""
    for name in names:
        import_package(name, f"--log {name}")


class Trackers:
    """All trackers of a run. One that fails is told once and left out; the run goes on."""

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, object]) -> None:
        self.open: dict[str, Tracker] = {}
        for name in names:
            self._try(name, partial(self._start, name, folder, config))

    def _start(self, name: str, folder: Path, config: Mapping[str, object]) -> None:
        self.open[name] = TRACKERS[name](folder, config)

    def _try(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # whatever it is, it must not end the training
            self.open.pop(name, None)
            LOGGER.warning("%s has failed (%s: %s) and gets no more numbers; the training goes on",
                           name, type(error).__name__, first_line(error))

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Send named values, but for None (a test set without ground truth)."""
        known = {name: value for name, value in values.items() if value is not None}
        for name, tracker in list(self.open.items()) if known else ():
            self._try(name, partial(tracker.scalars, step, known))

    def image(self, step: int, title: str, draw: Callable[[], np.ndarray]) -> None:
        """Send the image that ``draw()`` returns, uint8 [H, W, 3] BGR.

        Without trackers it is not called.
        """
        if self.open:
            rgb = np.ascontiguousarray(draw()[:, :, ::-1])
        for name, tracker in list(self.open.items()):
            self._try(name, partial(tracker.image, step, title, rgb))

    def close(self) -> None:
        for name, tracker in list(self.open.items()):
            self._try(name, tracker.close)
