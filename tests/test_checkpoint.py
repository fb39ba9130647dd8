"""Checkpoints: what is read, what is refused, and that a file is never half written."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict

import pytest
import torch

from models.hardnet import HARDNET_SPECS, HarDNetBase
from models.vgg import VGGBase
from utils.checkpoint import load_base, load_checkpoint, save_checkpoint, sha256_of
from utils.errors import UserError


@pytest.fixture(scope="module")
def base():
    return HarDNetBase(HARDNET_SPECS[68])


def test_a_checkpoint_round_trips_exactly(tmp_path):
    state = {
        "model": {"a.weight": torch.randn(3, 4), "a.count": torch.tensor(7)},
        "classes": ["x", "ä b"],
        "config": {"lr": 4e-3, "sets": [[None, "train"]]},
        "step": 12,
    }
    save_checkpoint(tmp_path / "c.pth", state)
    loaded = load_checkpoint(tmp_path / "c.pth")
    assert {k: loaded[k] for k in ("classes", "config", "step")} == {
        k: state[k] for k in ("classes", "config", "step")
    }
    for key, tensor in state["model"].items():
        assert torch.equal(loaded["model"][key], tensor)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_bare_state_dict_loads_with_and_without_the_dataparallel_prefix(tmp_path, prefix):
    torch.save(OrderedDict({f"{prefix}a.weight": torch.ones(2)}), tmp_path / "c.pth")
    assert list(load_checkpoint(tmp_path / "c.pth")["model"]) == ["a.weight"]


def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth.*run code are not opened"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged"),
        (b"<html>quota exceeded</html>", "damaged"),
        (None, "does not exist"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "c.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"c\.pth.*{words}"):
        load_checkpoint(path)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    save_checkpoint(tmp_path / "c.pth", {"model": {"w": torch.randn(1000)}})
    data = (tmp_path / "c.pth").read_bytes()
    (tmp_path / "c.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"c\.pth is damaged"):
        load_checkpoint(tmp_path / "c.pth")


def test_entries_that_are_no_tensors_are_named(tmp_path):
    torch.save({"epoch": 3, "w": torch.ones(1)}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="1 entries that are no named tensors: epoch"):
        load_checkpoint(tmp_path / "c.pth")
    torch.save([1, 2], tmp_path / "c.pth")
    with pytest.raises(UserError, match="holds a list"):
        load_checkpoint(tmp_path / "c.pth")


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path):
    torch.save({"format": 99, "model": {"w": torch.ones(1)}}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="format 99"):
        load_checkpoint(tmp_path / "c.pth")


def test_a_failed_write_leaves_the_earlier_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "c.pth"
    save_checkpoint(path, {"model": {"w": torch.ones(1)}})
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"c\.pth could not be written.*No space left"):
        save_checkpoint(path, {"model": {"w": torch.zeros(1)}})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.pth"]


@pytest.mark.parametrize("prefix", ["", "base.", "module.", "module.base."])
def test_base_weights_load_whatever_their_prefix(tmp_path, base, prefix):
    torch.save({prefix + k: torch.full_like(t, 3) for k, t in base.state_dict().items()},
               tmp_path / "b.pth")  # fmt: skip
    fresh = HarDNetBase(HARDNET_SPECS[68])
    assert load_base(fresh, tmp_path / "b.pth") == len(base.state_dict())
    assert all((t == 3).all() for t in fresh.state_dict().values())


def test_base_weights_of_a_pytorch_without_batch_counters_load(tmp_path, base):
    state = {k: t for k, t in base.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "b.pth")
    load_base(HarDNetBase(HARDNET_SPECS[68]), tmp_path / "b.pth")


def test_base_weights_that_do_not_all_fit_are_listed_and_nothing_is_loaded(tmp_path):
    base = VGGBase()
    state = base.state_dict()
    before = {k: t.clone() for k, t in state.items()}
    changed = {k: torch.zeros_like(t) for k, t in state.items() if k != "33.bias"}
    changed |= {"0.weight": torch.zeros(2), "classifier.weight": torch.zeros(2)}
    torch.save(changed, tmp_path / "b.pth")
    with pytest.raises(UserError) as error:
        load_base(base, tmp_path / "b.pth")
    for words in (
        "only 28 of the base network's 30 tensors",
        "1 of another shape: 0.weight [2] instead of [64, 3, 3, 3]",
        "1 missing: 33.bias",
        "1 unexpected: classifier.weight",
    ):
        assert words in str(error.value)
    assert all(torch.equal(t, before[k]) for k, t in base.state_dict().items())


def test_sha256_is_the_files(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 700_000)
    assert sha256_of(tmp_path / "f") == hashlib.sha256(b"abc" * 700_000).hexdigest()
