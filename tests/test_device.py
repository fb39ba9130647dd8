"""The device that a name means, and what cannot serve."""

import pytest
import torch

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
