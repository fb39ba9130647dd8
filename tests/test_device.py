"""The device that a name means, and what cannot serve."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine.steps
from data.config import VOC_300
from engine.optim import MovingAverage, build_optimizer
from engine.options import Options
from layers import MultiBoxLoss, PriorBox
from models import build_net
from utils.device import choose_device
from utils.errors import UserError


@pytest.fixture
def gpus(monkeypatch):
    """Make PyTorch see two GPUs; nothing may change the current one."""

    def changed(device):
        raise AssertionError("choosing a device changes the process's current one")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", changed)


@pytest.mark.parametrize(
    ("name", "local_rank", "expected"),
    [("auto", None, "cuda"), ("cpu", None, "cpu"), ("cpu", 1, "cpu"), ("cuda", None, "cuda"),
     ("cuda:1", None, "cuda:1"), ("auto", 1, "cuda:1"), ("cuda", 0, "cuda:0")],
)
def test_a_name_means_a_device(gpus, name, local_rank, expected):
    amp = "bf16" if expected == "cpu" else "fp16"
    assert choose_device(name, amp, local_rank) == torch.device(expected)


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device() == torch.device("cpu")
    with pytest.raises(UserError, match=r"mps.*--device cpu"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device() == choose_device("mps", "bf16") == torch.device("mps")
    with pytest.raises(UserError, match=r"fp16.*bf16"):
        choose_device("mps", "fp16")


@pytest.mark.parametrize(("arguments", "value", "fix"), [
    (("cuda:2",), "cuda:2", "--device cpu"), (("auto", "off", 2), "cuda:2", "--device cpu"),
    (("cuda:1", "off", 0), "cuda:1", "leave it out"), (("tpu",), "tpu", "cuda:N"),
    (("cuda:x",), "cuda:x", "cuda:N"), (("cuda:",), "cuda:", "cuda:N"),
    (("cpu", "fp16"), "fp16", "bf16"),
])
def test_what_cannot_serve_is_refused(gpus, arguments, value, fix):
    with pytest.raises(UserError, match=rf"{value}.*{fix}"):
        choose_device(*arguments)


class Lacking(TorchDispatchMode):
    """Let the device "meta" refuse float64, as Apple's GPU does; what comes back from it is 0."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros_like(args[0], device="cpu")
        result = func(*args, **kwargs)
        if any(isinstance(each, torch.Tensor) and each.is_meta and each.dtype == torch.float64
               for each in tree_leaves(result)):  # fmt: skip
            raise TypeError(f"{func} gives float64")
        return result


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_makes_no_float64_on_its_device(optimizer, tiny, monkeypatch):
    monkeypatch.setattr(engine.steps, "autocast", lambda *_: contextlib.nullcontext())
    images = torch.zeros(2, 3, 300, 300, dtype=torch.uint8)
    targets = [torch.tensor([[0.1, 0.2, 0.6, 0.7, 1.0]]), torch.zeros(0, 5)]
    with Lacking():
        net, priors = build_net("tiny", 300, 3).to("meta"), PriorBox(VOC_300).to("meta")()
        with pytest.raises(TypeError, match="float64"):
            priors.double()
        average, loss = MovingAverage(net, 0.9), MultiBoxLoss(3, least_negatives=9)
        updates = build_optimizer(net, Options(optimizer=optimizer))
        step = engine.steps.TrainStep(net, loss, priors, updates, clip_norm=1)
        assert step([(images, targets, [0, 1])], 1e-3).results() == (0, 0, False)
        average.update(net)
    assert all(value.is_meta for value in average.net.state_dict().values())
