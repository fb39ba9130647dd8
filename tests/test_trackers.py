"""Trackers: each one gets the numbers of a run offline, and none can end it."""

import sys

import numpy as np
import pytest

from engine.options import Options
from utils import trackers
from utils.errors import UserError
from utils.trackers import TRACKERS, Trackers, check_trackers


class Notes:
    """A tracker in memory."""

    def __init__(self, folder, config):
        self.got, self.config, self.closed = [], config, False

    def scalars(self, step, values):
        self.got.append((step, values))

    def image(self, step, name, rgb):
        self.got.append((step, name, rgb))

    def close(self):
        self.closed = True


def failing(method):
    def fail(*_):
        raise OSError("no network")

    return type("Failing", (Notes,), {method: fail})


@pytest.mark.parametrize("method", ["__init__", "scalars", "image", "close"])
def test_a_tracker_that_fails_is_told_once_and_the_others_go_on(tmp_path, monkeypatch, caplog,
                                                                method):
    monkeypatch.setitem(TRACKERS, "bad", failing(method))
    monkeypatch.setitem(TRACKERS, "good", Notes)
    both = Trackers(["bad", "good"], tmp_path, {"lr": 1})
    good = both.open["good"]
    both.scalars(1, {"loss": 2.0, "AP": None})
    both.scalars(2, {"AP": None})
    both.image(3, "images", lambda: np.uint8([[[1, 2, 3]]]))
    both.close()
    (numbers, image), closed = good.got, good.closed
    assert numbers == (1, {"loss": 2.0}) and image[:2] == (3, "images") and closed
    assert image[2].tolist() == [[[3, 2, 1]]] and good.config == {"lr": 1}
    (record,) = caplog.records
    assert all(word in record.getMessage() for word in ("bad", "no network", "goes on"))


def test_without_trackers_no_image_is_drawn(tmp_path):
    Trackers([], tmp_path, {}).image(1, "images", lambda: 1 / 0)


def test_a_package_that_is_missing_is_named_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match="--log mlflow.*pip install mlflow"):
        check_trackers(["mlflow"])


def test_visdom_is_tensorboard():
    assert Options(visdom=True, log="wandb,tensorboard").trackers == ["tensorboard", "wandb"]
    assert Options().trackers == []


@pytest.mark.parametrize("name", TRACKERS)
def test_a_run_and_its_continuation_reach_the_tracker_offline(tmp_path, monkeypatch, name):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    pytest.importorskip(name)
    check_trackers([name])
    folder = tmp_path / "run"
    for start in (0, 2):
        opened = Trackers([name], folder, {"lr": 0.1, "classes": ["a"], "root": None})
        for step in (start + 1, start + 2):
            opened.scalars(step, {"loss": 1 / step, "VOC area AP@.5": 0.5})
        opened.image(start + 2, "images", lambda: np.zeros((4, 6, 3), np.uint8))
        opened.close()
        assert list(opened.open) == [name]
    if name == "mlflow":
        client = sys.modules["mlflow"].MlflowClient()
        (experiment,) = [e for e in client.search_experiments() if e.name == trackers.PROJECT]
        last = client.search_runs([experiment.experiment_id])[0].data.metrics
        assert last == {"loss": 0.25, "VOC area AP_.5": 0.5}
    assert name == "tensorboard" or len([*tmp_path.rglob("*.png")]) == 2
