"""Published files, base networks in files of weights, and the command tools.weights."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import TINY
from torch import Tensor

from models import BACKBONES, build_net, pretrained
from models.base_weights import load_base, match_base
from models.hardnet import HARDNET_SPECS, HarDNetBase
from models.pretrained import PUBLISHED, examine, published, published_bases
from tools.weights import main
from train_test import main as train_test
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.download import Place
from utils.errors import UserError

ROOT = Path(__file__).parent.parent


def base_of(version: str) -> dict[str, Tensor]:
    """The state dict of a detector's base, without data."""
    with torch.device("meta"):
        return BACKBONES[version].base().state_dict()


def full_of(value: float, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Tensors of the shapes of ``state``, full of one number that is stored once."""
    return {prefix + key: torch.full((), value, dtype=tensor.dtype).expand(tensor.shape)
            for key, tensor in state.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Made-up files of the published kinds: name -> path."""
    folder = tmp_path_factory.mktemp("files")
    with torch.device("meta"):
        net = build_net("SSD_HarDNet68", 300, 21)
    state = full_of(0.5, net.state_dict())
    base = {key: tensor for key, tensor in state.items() if key.startswith("base.")}
    classifier = {key: tensor for key, tensor in base.items() if int(key.split(".")[1]) < 13}
    kinds = {
        "detector": state,
        "parallel": {f"module.{key}": tensor for key, tensor in state.items()},
        "base": {key.removeprefix("base."): tensor for key, tensor in base.items()},
        "classifier": classifier | {"base.16.3.bias": torch.zeros(1000)},
        "old": {k: t for k, t in state.items() if "num_batches_tracked" not in k},
        "damaged": {k: t for k, t in state.items() if not k.startswith("base.13.")},
        "odd": {**state, "conf.0.weight": torch.tensor(1.0)},
        "other": {k: t for k, t in state.items() if k != "conf.1.bias"} | {"x": torch.zeros(1)},
    }
    for name, tensors in kinds.items():
        torch.save(tensors, folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in kinds}


def test_every_row_names_detectors_that_exist_and_a_known_kind_of_hash():
    for row in PUBLISHED:
        assert set(row.versions) <= set(BACKBONES), row
        assert row.places and row.file.endswith(".pth") and row.licence
        for url, checksum in row.places:
            assert url.startswith("https://")
            kind, _, value = (checksum or "none:").partition(":")
            assert len(value) == {"git": 40, "sha256": 8, "none": 0}[kind]
            if kind == "sha256":  # the publishers write it into the name
                assert url.endswith(f"-{value}.pth")
        assert (row.size is None) == (row.num_classes is None)
    for field in ("name", "file", "places"):
        assert len({getattr(row, field) for row in PUBLISHED}) == len(PUBLISHED)


def test_every_detector_has_a_base_file_and_those_with_a_classifier_have_its_file():
    for version, row in BACKBONES.items():
        files = published_bases(version)
        assert files, version
        hashed = [file for file in files if any("sha256:" in (place.checksum or "")
                                                for place in file.places)]
        assert bool(hashed) == (row.classifier is not None), version
    assert published_bases("RFB_HarDNet68")[0].file == "hardnet68_base_bridge.pth"


def test_the_page_of_the_folder_has_every_row():
    page = (ROOT / "weights" / "README.md").read_text("utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(lines) == len(PUBLISHED)
    for row, line in zip(PUBLISHED, lines, strict=True):
        values = [(checksum or ":none").partition(":")[2] for _, checksum in row.places]
        urls = [place.url for place in row.places]
        for text in (row.name, f"`{row.file}`", *urls, *values, row.licence, *row.versions):
            assert text in line, (row.name, text)


def test_list_prints_them_and_an_unknown_name_is_answered_with_all(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for row in PUBLISHED:
        assert all(text in printed for text in (row.fits, *(place.url for place in row.places)))
    assert main(["download", "hardnet99"]) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in ("hardnet99", *(row.name for row in PUBLISHED)))
    assert published("vgg16_reducedfc.pth") is published("vgg16-reducedfc")


@pytest.fixture
def offer(files, server, monkeypatch):
    """offer(name, kind, checksum, **changes): let a row lead to a local host of the files."""

    def set_row(name, kind, checksum=None, **changes):
        server.files[f"/{kind}"] = files[kind].read_bytes()
        places = (Place(f"{server.base}/{kind}", checksum),)
        row = replace(published(name), places=places, **changes)
        others = [other for other in PUBLISHED if other.name != name]
        monkeypatch.setattr(pretrained, "PUBLISHED", (*others, row))

    return set_row


def git(path):
    return "git:" + subprocess.check_output(["git", "hash-object", path], text=True).strip()


def test_download_is_verified_and_put_in_place(offer, files, tmp_path, capsys):
    offer("hardnet68-base", "base", checksum=git(files["base"]))
    assert main(["download", "hardnet68-base", "--to", str(tmp_path / "new")]) == 0
    path = tmp_path / "new" / "hardnet68_base_bridge.pth"
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_bytes() == files["base"].read_bytes()


@pytest.mark.parametrize(("name", "kind", "fitting"), [
    ("vgg16-reducedfc", "base", {"versions": ("SSD_HarDNet68",)}),
    ("ssd512-hardnet68-coco", "old", {"size": 300, "num_classes": 21})])
def test_a_file_without_a_published_hash_is_judged_by_its_tensors(offer, files, tmp_path, name,
                                                                  kind, fitting):
    offer(name, kind)
    row = published(name)
    with pytest.raises(UserError) as caught:
        pretrained.download(name, tmp_path)
    assert f"its tensors are not those of {row.fits}" in str(caught.value)
    assert os.listdir(tmp_path) == []
    offer(name, kind, **fitting)
    assert pretrained.download(name, tmp_path).read_bytes() == files[kind].read_bytes()


def test_any_file_of_weights_comes_from_hugging_face(files, tmp_path, monkeypatch):
    hub = SimpleNamespace(hf_hub_download=lambda repository, file, revision: str(files["old"]))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    path = pretrained.download("hf://org/repo/folder/a.pth@main", tmp_path)
    assert path == tmp_path / "a.pth" and path.read_bytes() == files["old"].read_bytes()


@pytest.mark.parametrize("prefix", ["", "base.", "module.", "module.base."])
def test_base_weights_load_whatever_their_prefix(tmp_path, prefix):
    net = HarDNetBase(HARDNET_SPECS["39ds"])
    torch.save(full_of(3, net.state_dict(), prefix), tmp_path / "b.pth")
    match = load_base(net, tmp_path / "b.pth", "SSD_HarDNet39ds")
    assert (len(match.tensors), match.source) == (len(net.state_dict()), "a base network")
    assert match.unused == match.missing == []
    assert all((tensor == 3).all() for tensor in net.state_dict().values())


def test_base_weights_that_do_not_all_fit_are_listed_and_nothing_is_loaded(tmp_path):
    net = HarDNetBase(HARDNET_SPECS["39ds"])
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    state = full_of(0, before)
    del state["10.norm.bias"]
    state |= {"0.conv.weight": torch.zeros(2), "classifier.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(UserError) as error:
        load_base(net, tmp_path / "b.pth", "SSD_HarDNet39ds")
    for words in ("b.pth", f"only {len(before) - 2} of the base network's {len(before)} tensors",
                  "1 of another shape: 0.conv.weight [2] instead of [24, 3, 3, 3]",
                  "1 missing: 10.norm.bias", "1 unused: classifier.weight"):
        assert words in str(error.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


@pytest.mark.parametrize("broken", [torch.tensor(torch.nan), torch.tensor(3)])
def test_base_weights_that_are_no_finite_numbers_are_refused_by_name(tmp_path, broken):
    net = HarDNetBase(HARDNET_SPECS["39ds"])
    state = full_of(0, net.state_dict())
    state["1.norm.running_mean"] = broken.expand(state["1.norm.running_mean"].shape).clone()
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"b\.pth.*1\.norm\.running_mean"):
        load_base(net, tmp_path / "b.pth", "SSD_HarDNet39ds")


def test_a_whole_detector_gives_its_base_and_the_log_names_the_rest(tmp_path, caplog):
    net = HarDNetBase(HARDNET_SPECS["39ds"])
    heads = {f"extras.{i}.weight": torch.zeros(1) for i in range(25)}
    state = full_of(3, net.state_dict(), "base.") | heads
    torch.save({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path / "d.pth")
    with caplog.at_level("INFO"):
        match = load_base(net, tmp_path / "d.pth", "SSD_HarDNet39ds")
    assert match.source == "the base of a detector"
    assert (match.unused, match.missing) == (list(heads), [])
    assert all((tensor == 3).all() for tensor in net.state_dict().values())
    assert "d.pth: 25 not used: extras.0.weight" in caplog.text
    assert caplog.text.rstrip().endswith("extras.19.weight and 5 more")


@pytest.mark.parametrize("version", BACKBONES)
def test_every_base_is_found_in_its_detector(version):
    base = base_of(version)
    heads = {"loc.0.bias": torch.zeros(1)}
    match = match_base(base, full_of(3, base, "base.") | heads, BACKBONES[version])
    assert match.fits and match.source == "the base of a detector"
    assert (match.unused, match.missing) == (["loc.0.bias"], [])


def hardnet_classifier(base: Mapping[str, Tensor], stages: int) -> dict[str, Tensor]:
    """The first stages of ``base``, and the classifier's own last block and head."""
    state = {key: tensor for key, tensor in full_of(2, base, "base.").items()
             if int(key.split(".")[1]) < stages}
    end = f"base.{stages + 1}"
    return state | {f"{end}.layers.0.conv.weight": torch.zeros(4), f"{end}.3.bias": torch.zeros(9)}


@pytest.mark.parametrize(
    ("version", "stages", "new"),
    [("SSD_HarDNet68", 13, "13."), ("SSD_HarDNet85", 15, None), ("SSD_HarDNet68ds", 13, None),
     ("SSD_HarDNet39ds", 11, None)])
def test_the_familys_classifier_gives_its_stages_and_a_bridge_stays_new(version, stages, new):
    base = base_of(version)
    match = match_base(base, hardnet_classifier(base, stages), BACKBONES[version])
    assert match.fits and match.source == "a classifier"
    assert [key.split(".")[1] for key in match.unused] == [str(stages + 1)] * 2
    bridge = [key for key in base if new and key.startswith(new)]
    assert match.missing == [key for key in bridge if "num_batches" not in key]
    assert match.tensors.keys() == base.keys() - set(bridge)


@pytest.mark.parametrize(
    ("classifier", "drop"),
    [(True, "base.12."), (True, "base.8.layers.3."), (True, "base.0."), (False, "base.13."),
     (False, "base.12."), (False, "base.")])
def test_a_classifier_or_detector_without_a_part_of_its_base_does_not_fit(classifier, drop):
    base = base_of("SSD_HarDNet68")
    detector = full_of(2, base, "base.") | {"conf.0.bias": torch.zeros(126)}
    state = hardnet_classifier(base, 13) if classifier else detector
    state = {key: tensor for key, tensor in state.items() if not key.startswith(drop)}
    match = match_base(base, state, BACKBONES["SSD_HarDNet68"])
    assert not match.fits and any(key.startswith(drop[5:]) for key in match.missing)


@pytest.mark.parametrize("file, version", [("85", "SSD_HarDNet68"), ("68", "SSD_HarDNet85")])
def test_a_classifier_of_another_depth_does_not_fit(file, version):
    state = hardnet_classifier(base_of(f"SSD_HarDNet{file}"), 13)
    match = match_base(base_of(version), state, BACKBONES[version])
    assert not match.fits and match.wrong and "instead of" in match.wrong[0]


@pytest.mark.parametrize(
    ("version", "name", "head"),
    [("SSD_resnet101", "resnet101", "fc."), ("SSD_mobile", "mobilenet_v2", "classifier.")])
def test_torchvisions_classifiers_give_their_layers_but_no_head(version, name, head):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        classifier = getattr(models, name)(weights=None).state_dict()
    match = match_base(base_of(version), classifier, BACKBONES[version])
    assert match.fits and match.source == "a classifier"
    assert match.missing == [] and len(match.tensors) == match.total
    assert all(key.startswith(head) for key in match.unused)


def test_vgg16_reducedfc_has_the_positions_of_the_published_list():
    widths = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256),
              14: (256, 256), 17: (512, 256), **dict.fromkeys((19, 21, 24, 26, 28), (512, 512)),
              31: (1024, 512), 33: (1024, 1024)}
    state = {}
    for i, (outputs, inputs) in widths.items():
        kernel = 1 if i == 33 else 3
        state[f"{i}.weight"] = torch.empty(outputs, inputs, kernel, kernel, device="meta")
        state[f"{i}.bias"] = torch.empty(outputs, device="meta")
    match = match_base(base_of("SSD_vgg"), state, BACKBONES["SSD_vgg"])
    assert match.fits and match.tensors == state and len(state) == match.total == 30


@pytest.mark.parametrize("kind", ["detector", "parallel", "old"])
def test_a_detector_is_named_with_its_hashes(files, kind):
    found = examine(files[kind])
    assert (found.version, found.size, found.num_classes) == ("SSD_HarDNet68", 300, 21)
    assert found.missing == found.unused == found.wrong == []
    assert found.basenet == ["SSD_HarDNet68", "SSD_HarDNet68bn", "RFB_HarDNet68"]
    assert found.parameters == 17_260_864  # as published code has them
    assert kind == "old" or found.tensors == 425
    assert found.sha256 == hashlib.sha256(files[kind].read_bytes()).hexdigest()
    assert found.origin is None
    assert found.git_blob == git(files[kind])[4:]


def test_a_base_file_and_a_classifier_say_what_they_start(files, capsys):
    base, classifier = examine(files["base"]), examine(files["classifier"])
    for found in (base, classifier):
        assert found.basenet == ["SSD_HarDNet68", "SSD_HarDNet68bn", "RFB_HarDNet68"]
        assert found.version is None
    assert base.missing == base.unused == []
    assert base.parameters == 12_104_928
    assert classifier.unused == ["base.16.3.bias"]
    assert all(key.startswith("13.") for key in classifier.missing)
    assert main(["inspect", str(files["classifier"])]) == 0
    assert "a classifier for SSD_HarDNet68" in capsys.readouterr().out


def test_a_near_miss_is_compared_to_the_closest_detector(files, capsys):
    assert main(["inspect", str(files["other"]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] is None
    assert found["closest"] == "SSD_HarDNet68 at 300, 21 classes with background"
    assert (found["missing"], found["unused"]) == (["conf.1.bias"], ["x"])
    assert main(["inspect", str(files["other"])]) == 0
    printed = capsys.readouterr().out
    assert "missing      1: conf.1.bias" in printed and "unused       1: x" in printed
    found = examine(files["damaged"])  # a part of its base is missing
    assert found.closest.startswith("SSD_HarDNet68 at 300") and found.basenet == []
    assert found.missing and all(key.startswith("base.13.") for key in found.missing)
    assert (found.version, found.unused, found.wrong) == (None, [], [])


def test_what_cannot_be_compared_is_said(files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    assert main(["inspect", str(files["odd"])]) == 0
    printed = capsys.readouterr().out
    assert "conf.0.weight [] instead of [" in printed
    assert "SSD_resnet101 was not compared: " in printed


def test_a_published_file_is_recognised_by_its_hash(files, monkeypatch, capsys):
    row = published("ssd512-hardnet68-coco")
    row = replace(row, places=(*row.places, Place("x", git(files["detector"]))))
    monkeypatch.setattr(pretrained, "PUBLISHED", (row,))
    assert main(["inspect", str(files["detector"])]) == 0
    printed = capsys.readouterr().out
    assert "ssd512-hardnet68-coco, https://drive.google.com" in printed
    assert "SSD_HarDNet68 at 300, 21 classes with background" in printed


@pytest.mark.parametrize("kind", ["detector", "parallel", "base"])
def test_a_bare_state_dict_comes_back_exactly(files, tmp_path, kind):
    safetensors = pytest.importorskip("safetensors")
    there, back = tmp_path / "x.safetensors", tmp_path / "back.pth"
    assert main(["convert", str(files[kind]), str(there)]) == 0
    assert main(["convert", str(there), str(back)]) == 0
    before = load_checkpoint(files[kind])["model"]
    after = torch.load(back, weights_only=True)
    assert list(after) == list(before)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype
    with safetensors.safe_open(there, "pt") as file:
        about = file.metadata()
    identity = {"version": '"SSD_HarDNet68"', "size": "300"}
    expected = {} if kind == "base" else identity
    assert {key: about[key] for key in about if key != "keys"} == expected


def test_a_checkpoint_keeps_classes_and_configuration_but_no_optimizer(tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors")
    saved = {
        "model": {"w": torch.randn(3)},
        "classes": ["ä", "b c"],
        "config": {"version": "SSD_vgg", "size": 300, "lr": 4e-3, "test_sets": [[None, "test"]]},
    }
    save_checkpoint(tmp_path / "c.pth", {**saved, "optimizer": {"lr": 1}, "step": 3})
    there, back = tmp_path / "c.safetensors", tmp_path / "back.pth"
    assert main(["convert", str(tmp_path / "c.pth"), str(there)]) == 0
    assert capsys.readouterr().out == f"{there} (left out: optimizer, step)\n"
    with safetensors.safe_open(there, "pt") as file:
        about = {key: json.loads(text) for key, text in file.metadata().items()}
    assert about == {"version": "SSD_vgg", "size": 300, "keys": ["w"], "classes": saved["classes"],
                     "config": saved["config"]}
    assert main(["convert", str(there), str(back)]) == 0
    after = load_checkpoint(back)
    assert torch.equal(after.pop("model")["w"], saved["model"]["w"])
    assert after == {"classes": saved["classes"], "config": saved["config"], "format": 1}


def test_what_a_foreign_checkpoint_holds_is_listed_and_left_out_with_a_notice(tmp_path, capsys):
    pytest.importorskip("safetensors")
    source, target = tmp_path / "c.pth", tmp_path / "c.safetensors"
    torch.save({"state_dict": {"w": torch.ones(1)}, "optimizer": {}, "classes": 9}, source)
    assert examine(source).holds == ["model", "classes", "optimizer"]
    assert main(["convert", str(source), str(target)]) == 0
    assert capsys.readouterr().out == f"{target} (left out: classes, optimizer)\n"


@pytest.mark.parametrize("depth", [100, 9000, 100_000])
def test_configurations_of_any_depth_convert_or_are_refused(tmp_path, capsys, depth):
    safetensors = pytest.importorskip("safetensors.torch")
    source, target = tmp_path / "c.safetensors", tmp_path / "c.pth"
    text = '{"x":' * depth + "1" + "}" * depth
    safetensors.save_file({"a": torch.ones(1)}, source, {"config": text})
    status = main(["convert", str(source), str(target)])
    error = capsys.readouterr().err
    assert (status, error.count("\n"), target.exists()) in [(0, 0, True), (2, 1, False)]
    assert (depth != 100 or status == 0) and (depth != 100_000 or status == 2)
    assert sorted(os.listdir(tmp_path)) == ["c.pth"] * (status == 0) + ["c.safetensors"]


def test_names_that_say_no_conversion_and_files_that_exist_are_refused(files, tmp_path, capsys):
    assert main(["convert", str(files["base"]), str(tmp_path / "b.pth")]) == 2
    assert ".safetensors" in capsys.readouterr().err
    (tmp_path / "b.safetensors").write_bytes(b"mine")
    assert main(["convert", str(files["base"]), str(tmp_path / "b.safetensors")]) == 2
    assert "b.safetensors exists" in capsys.readouterr().err
    assert (tmp_path / "b.safetensors").read_bytes() == b"mine"


def test_a_converted_checkpoint_tests_as_the_original(tmp_path, voc_folder, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.setitem(BACKBONES, "tiny", TINY)
    common = ["--save_folder", str(tmp_path), "--device", "cpu", "--num_workers", "0"]
    options = ["--root", str(voc_folder), "-v", "tiny", "-s", "300", "-b", "4", "-max", "1"]
    assert train_test([*options, *common, "--date", "a", "--test_frequency", "0"]) == 0
    run = tmp_path / "tiny_300" / "a"
    path = run / "Final_tiny_VOC.pth"
    assert main(["convert", str(path), str(run / "converted.safetensors")]) == 0
    scores = []
    for file in (path, run / "converted.safetensors"):
        assert train_test(["--test", str(file), *common]) == 0
        results = run / "ss_predict" / file.stem / "test" / "results.json"
        scores.append(json.loads(results.read_text()))
    for key in ("value", "per_class", "detection_count", "classes"):
        assert scores[0].get(key) == scores[1].get(key)
    start = ["--resume_net", str(run / "converted.safetensors"), "--test_frequency", "0"]
    assert train_test([*options, *common, "--date", "b", *start]) == 0
