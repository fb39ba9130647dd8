"""The detectors as torch.hub loads them, from a folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hubconf
from inference.predictor import Predictor
from models import BACKBONES, build_net
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError

ROOT = Path(__file__).parent.parent


def load(name: str, *arguments, **options):
    return torch.hub.load(str(ROOT), name, *arguments, source="local", **options)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A checkpoint of three classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hub") / "own.pth"
    config = {"version": "SSD_HarDNet39ds", "size": 300, "dataset": "VOC", "priors": "VOC"}
    model = build_net("SSD_HarDNet39ds", 300, 4).state_dict()
    save_checkpoint(path, {"model": model, "classes": ["a", "b", "c"], "config": config})
    return path


def test_every_network_and_size_has_an_entry_with_help():
    expected = {f"{version.split('_')[0].lower()}{size}_{version.split('_')[1].lower()}"
                for version, row in BACKBONES.items() for size in row.sizes}
    assert {"ssd512_hardnet68", "ssd512_hardnet85", "rfb512_hardnet68", "ssd300_vgg"} < expected
    # The rule of torch.hub.list.
    public = {n for n, value in vars(hubconf).items() if callable(value) and n[0] != "_"}
    assert public == expected | {"predictor"}
    for name in expected:
        assert "pretrained" in getattr(hubconf, name).__doc__


def test_loads_in_another_folder_and_process(file, tmp_path):
    program = (
        f"import torch; net = torch.hub.load({str(ROOT)!r}, 'ssd300_hardnet39ds', source='local',"
        f" pretrained={str(file)!r}); print(net.num_classes)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout == "4\n", done.stderr


def test_new_weights_and_those_of_a_file(file):
    new = load("ssd300_hardnet39ds", num_classes=4)
    assert new.num_classes == 4 and new.training
    assert load("ssd300_hardnet39ds").num_classes == 81
    assert load("ssd300_hardnet39ds", classes=["a", "b"]).num_classes == 3
    net = load("ssd300_hardnet39ds", pretrained=str(file))
    assert not net.training
    saved = load_checkpoint(file)["model"]
    assert all(torch.equal(value, saved[key]) for key, value in net.state_dict().items())


def test_a_file_without_names_takes_those_that_are_given(file, tmp_path):
    torch.save(load_checkpoint(file)["model"], tmp_path / "bare.pth")
    bare = str(tmp_path / "bare.pth")
    assert load("ssd300_hardnet39ds", pretrained=bare, classes=["a", "b", "c"]).num_classes == 4


def test_predictor(file):
    found = load("predictor", str(file))
    assert isinstance(found, Predictor) and found.info.classes == ("a", "b", "c")


def test_published_weights_are_downloaded_by_their_name(file, monkeypatch, tmp_path):
    asked = []

    def download(name, folder):
        asked.append((name, folder))
        return file

    monkeypatch.setattr(hubconf._pretrained, "download", download)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(UserError, match="is SSD_HarDNet39ds at 300, not SSD_HarDNet85 at 512"):
        hubconf.ssd512_hardnet85(pretrained=True)
    assert asked == [("ssd512-hardnet85-coco", tmp_path / "checkpoints")]


def test_mistakes_are_told(file):
    with pytest.raises(UserError, match="ssd300_vgg were published, only ssd512-hardnet68"):
        hubconf.ssd300_vgg(pretrained=True)
    with pytest.raises(UserError, match="has 4 classes with background, not 21"):
        hubconf.ssd300_hardnet39ds(pretrained=str(file), num_classes=21)
