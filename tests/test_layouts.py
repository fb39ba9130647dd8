"""Every layout of the labelling tools: found, read alike, split alike, known to all commands."""

import hashlib
import json
import re
import shutil
import unicodedata
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from layouts import ALL, IMAGES, LAYOUTS, TRAIN, VALID, write_images
from tiny import TINY

from data import build_dataset, default_sets, find_layout
from data.adapters import TorchvisionDataset
from data.skips import SkipKind
from demo.shapes import make_dataset
from engine.resolve import resolve
from inference.images import TrainedOn, find_images
from layers import MultiBoxLoss
from models import BACKBONES, build_net
from models.info import load_detector
from tools import check, report, sheet, split
from train_test import main
from utils.checkpoint import load_checkpoint
from utils.errors import UserError

UNDECLARED = [name for name, layout in LAYOUTS.items() if layout.sets is None]


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


@pytest.fixture(scope="module")
def root(layout, tmp_path_factory):
    root = tmp_path_factory.mktemp("layout") / "data"
    layout.write(root)
    return root


def open_sets(layout, root, **options):
    """The data sets to train on and to test on without a word of the user."""
    dataset, _ = find_layout(root)
    sets = default_sets(dataset, root)
    train = build_dataset(dataset, root, sets[0], **options)
    return train, build_dataset(dataset, root, sets[1], classes=train.classes, **options)


def names_of(dataset) -> list[str]:
    return [dataset.image_path(i).name for i in range(len(dataset))]


def contents(dataset) -> dict:
    """File name -> image size and sorted objects (class, x1, y1, x2, y2)."""
    found = {}
    for i, name in enumerate(names_of(dataset)):
        rows = dataset.target(i).astype(float)
        objects = sorted((dataset.classes[int(row[4]) - 1], *row[:4].round(3)) for row in rows)
        found[name] = (*dataset.image_size(i), objects)
    return found


def slow_split(names, share, pattern=None) -> tuple[set[str], set[str]]:
    """The rule of docs/own_data.md, literally: training images and test images."""
    groups: dict[str, list[str]] = {}
    for name in names:
        match = re.match(pattern, name) if pattern else None
        key = unicodedata.normalize("NFC", name.rpartition(".")[0])
        if match:
            key = match.group(1 if match.re.groups else 0)
        groups.setdefault(key, []).append(name)
    test: list[str] = []
    for key in sorted(groups, key=lambda key: hashlib.sha256(key.encode()).hexdigest()):
        if len(test) < share * len(names):
            test += groups[key]
    return set(names) - set(test), set(test)


def test_layout_is_found_by_itself_and_read_as_it_was_drawn(layout, root):
    assert find_layout(root) == (layout.dataset, layout.name)
    train, test = open_sets(layout, root)
    wanted = layout.sets or slow_split(ALL, 0.2)
    for dataset, names in zip((train, test), wanted, strict=True):
        truth = {
            layout.rename(name): (width, height, sorted(objects))
            for name, (width, height, objects) in IMAGES.items() if name in names
        }
        assert contents(dataset) == truth
        lost = [skip for skip in dataset.skipped if skip.kind.level == "warning"]
        assert {skip.kind for skip in lost} <= {SkipKind.NO_LABEL_FILE}, dataset.report()
        assert len(dataset.truth().boxes) == sum(len(each[2]) for each in truth.values())
    assert set(train.classes) == {"zebra", "red box", "cell"}
    if find_spec("torchvision"):
        image, target = TorchvisionDataset(train)[0]
        assert image.shape[:0:-1] == train.image_size(0)
        assert len(target["boxes"]) == len(train.target(0))


@pytest.mark.parametrize("share, pattern", [(0.4, None), (0.2, "[a-z]+"), (0.5, r"(\w+?)[_. ]")])
@pytest.mark.parametrize("name", UNDECLARED)
def test_split_is_the_same_in_every_layout(name, share, pattern, tmp_path):
    """Groups of one film stay on one side; the lists of `tools.split` say the same ever after."""
    LAYOUTS[name].write(tmp_path)
    given = ["--val_share", str(share), *(["--split_by", pattern] if pattern else [])]
    wanted = slow_split(ALL, share, pattern)
    parts = open_sets(LAYOUTS[name], tmp_path, val_share=share, split_by=pattern)
    assert tuple(set(names_of(part)) for part in parts) == wanted
    assert split.main(["--root", str(tmp_path), *given]) == 0
    assert tuple(set(names_of(part)) for part in open_sets(LAYOUTS[name], tmp_path)) == wanted


def one_set_beside(name, root):
    """Move the images of the west, and their annotations, to folders test/ where they lie."""
    LAYOUTS[name].write(root)
    for path in [*root.rglob("west_*")]:
        (path.parent / "test").mkdir(exist_ok=True)
        path.rename(path.parent / "test" / path.name)


def frames_of_a_film(root):
    """CVAT names the frames of a film without their suffix."""
    LAYOUTS["cvat"].write(root)
    text = (root / "annotations.xml").read_text()
    (root / "annotations.xml").write_text(re.sub(r'\.(jpg|png)"', '"', text))


def xmls_beside_masks(root):
    """The layout of TensorFlow's detection tutorials and of Oxford-IIIT Pet."""
    LAYOUTS["xml-folders"].write(root)
    (root / "annotations").mkdir()
    (root / "Annotations").rename(root / "annotations" / "xmls")


def paddle(root):
    """PaddleDetection's lists have the image and its annotation."""
    LAYOUTS["xml-folders"].write(root)
    for file, names in (("train.txt", TRAIN), ("valid.txt", VALID)):
        stems = [name.rpartition(".")[0] for name in names]
        (root / file).write_text("".join(f"./images/{name} ./Annotations/{stem}.xml\n"
                                         for name, stem in zip(names, stems, strict=True)))


def renamed(root):
    LAYOUTS["roboflow-voc"].write(root)
    shutil.rmtree(root / "valid")
    (root / "train").rename(root / "Training")
    (root / "test").rename(root / "test_images")


@pytest.mark.parametrize("write, train, test", [
    *((partial(one_set_beside, name), "default", "test")
      for name in ("labelimg", "xml-folders", "yolo-beside", "yolo-label-studio")),
    (paddle, "train", "valid"), (renamed, "Training", "test_images"),
    (partial(LAYOUTS["cvat"].write.func, {"": ALL[:8], "Validation": ALL[8:]}), "default",
     "Validation"),
])
def test_sets_of_other_names_are_not_mixed(write, train, test, tmp_path, caplog):
    write(tmp_path)
    options = resolve({"root": str(tmp_path), "dataset": find_layout(tmp_path)[0]})
    assert (options.train_sets, options.test_sets) == (((None, train),), ((None, test),))
    parts = open_sets(LAYOUTS["cvat"], tmp_path)
    if train == "default":
        assert {name[:4] for name in names_of(parts[1])} == {"west"} and len(parts[0]) == 8
    found = contents(parts[0]) | contents(parts[1])
    assert len(found) == len(parts[0]) + len(parts[1]) and not caplog.records
    for name in {*ALL} & found.keys():
        assert found[name] == (*IMAGES[name][:2], sorted(IMAGES[name][2]))


def test_a_list_alone_beside_the_data_is_no_image_set(tmp_path):
    LAYOUTS["xml-folders"].write(tmp_path)
    (tmp_path / "test.txt").write_text(f"{ALL[0]}\n")
    assert [*map(len, open_sets(LAYOUTS["xml-folders"], tmp_path))] == [9, 3]


def test_sets_whose_names_say_nothing_are_divided_and_told(tmp_path, caplog):
    LAYOUTS["voc"].write(tmp_path)
    for path in (tmp_path / "ImageSets").rglob("*.txt"):
        path.rename(path.with_name(f"part_{path.stem[:2]}.txt"))
    options = resolve({"root": str(tmp_path), "dataset": "VOC"})
    assert options.train_sets == ((None, "split_train"),)
    assert "part_te, part_tr" in caplog.text and "--test_sets" in caplog.text


@pytest.mark.parametrize("write", [frames_of_a_film, xmls_beside_masks])
def test_unusual_folders_are_divided_whole_and_read_alike(write, tmp_path):
    write(tmp_path)
    parts = open_sets(LAYOUTS["cvat"], tmp_path)
    assert [*map(len, parts)] == [9, 3]
    found = contents(parts[0]) | contents(parts[1])
    assert found == {name: (*IMAGES[name][:2], sorted(IMAGES[name][2])) for name in ALL}


@pytest.mark.parametrize(("name", "folder"), [
    ("darknet", "data"), ("roboflow-voc", "archive/shapes"), ("yolo-roboflow", "archive/shapes")])
def test_sets_that_a_subfolder_declares_are_not_passed_over(name, folder, tmp_path):
    LAYOUTS[name].write(tmp_path / folder)
    with pytest.raises(UserError) as error:
        find_layout(tmp_path)
    assert str(tmp_path / folder) in str(error.value) and "--root" in str(error.value)


@pytest.mark.parametrize("file, text, words", [
    ("a.json", '{"version": "5.1", "shapes": []}', ("a.json", "LabelMe", "convert")),
    ("train/_annotations.createml.json", '[{"annotations": [{"coordinates": 1}]}]',
     ("createml.json", "CreateML", "convert")),
    ("train/boxes.csv", "a.jpg,1,2,3,4,dog", ("boxes.csv", "convert")),
    ("obj_train_data/a.txt", "0 0.5 0.5 0.2 0.2", ("a.txt", "no images", "copy"))])
def test_a_format_that_is_not_read_is_named(file, text, words, tmp_path):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    if "no images" not in words:
        write_images(tmp_path / "train", ALL[:1])
    with pytest.raises(UserError) as error:
        find_layout(tmp_path)
    assert all(word in str(error.value) for word in words), error.value


def test_the_example_among_folders_of_sets_is_not_the_test(tmp_path):
    for name in ("a_test", "b_train"):
        LAYOUTS["coco"].write(tmp_path / name)
    with pytest.raises(UserError, match=f"such as {tmp_path / 'b_train'}"):
        find_layout(tmp_path)


def test_another_folder_does_not_hide_the_images_of_the_root(tmp_path):
    LAYOUTS["yolo-label-studio"].write(tmp_path)
    (tmp_path / "backup").mkdir()
    (tmp_path / "backup/obj.data").touch()
    assert find_layout(tmp_path)[0] == "YOLO"


def test_lists_of_a_devkit_without_a_set_to_test_on_decide(tmp_path):
    LAYOUTS["voc"].write(tmp_path / "VOC2021")
    (tmp_path / "VOC2021/ImageSets/Main/test.txt").rename(
        tmp_path / "VOC2021/ImageSets/Main/more.txt")
    before = [*map(names_of, open_sets(LAYOUTS["voc"], tmp_path))]
    assert split.main(["--root", str(tmp_path)]) == 0
    assert [*map(names_of, open_sets(LAYOUTS["voc"], tmp_path))] == before and all(before)


def test_check_counts_the_boxes_of_each_class(layout, root, tmp_path):
    check.main(["--root", str(root), "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["layout"] == layout.name and found["counts"]["error"] == 0, found["findings"]
    table = {}
    for part, names in zip(("train", "test"), layout.sets or slow_split(ALL, 0.2), strict=True):
        for label in ("zebra", "red box", "cell"):
            counts = [sum(o[0] == label for o in IMAGES[name][2]) for name in names]
            table.setdefault(label, {})[part] = [sum(counts), int(np.count_nonzero(counts))]
    assert found["classes"] == table


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_command_trains_and_the_others_open_the_same_data(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(BACKBONES, "tiny", TINY)
    monkeypatch.chdir(tmp_path)
    layout, cpu = LAYOUTS[name], ["--device", "cpu", "--num_workers", "0"]
    layout.write(tmp_path / "FOLDER")
    rule = ["--val_share", "0.4", "--split_by", "[a-z]+"]
    command = ["--root", "FOLDER", "-v", "tiny", "-s", "300", "-b", "2", "--max_iters", "1", *rule]
    assert main([*command, "--date", "a", *cpu]) == 0, capsys.readouterr().err
    assert layout.name in capsys.readouterr().out
    run = tmp_path / "weights" / "tiny_300" / "a"
    (checkpoint,) = run.glob("Final_*.pth")
    assert main(["--test", str(checkpoint), *cpu]) == 0, capsys.readouterr().err
    assert sheet.draw_sheet(run).is_file()
    if name in ("labelimg", "roboflow-coco", "yolo-roboflow"):  # its figures are slow
        assert report.write_report(run)[0].is_file()
    _, detector = load_detector(checkpoint)
    data = TrainedOn.of(load_checkpoint(checkpoint), checkpoint)
    calibration, proof = (find_images(None, None, 0, data, detector, training)
                          for training in (True, False))  # fmt: skip
    for found, names in zip((calibration, proof), layout.sets or slow_split(ALL, 0.4, rule[-1]),
                            strict=True):  # fmt: skip
        images = {found.dataset.image_path(i).name for i in found.items}
        assert images == {layout.rename(name) for name in names}
    assert proof.scored


def test_letters_of_two_characters_are_those_of_one(layout, tmp_path):
    layout.write(tmp_path)
    for path in tmp_path.rglob("*"):
        if path.suffix in (".xml", ".json", ".yaml", ".txt", ".names"):
            path.write_bytes(path.read_bytes().replace(b"zebra", "ze\u0301bra".encode()))
    train, test = open_sets(layout, tmp_path)
    assert "z\u00e9bra" in train.classes and contents(test)
    for classes in (train.classes, [unicodedata.normalize("NFD", name) for name in train.classes]):
        again = build_dataset(layout.dataset, tmp_path, train.image_sets, classes=classes)
        assert contents(again) == contents(train)


DATA = {"drawn": lambda root: make_dataset(root, trainval=6, test=2, size=(96, 160)),
        **{name: LAYOUTS[name].write for name in ("voc", "coco", "yolo-list", "cvat")}}


@pytest.mark.parametrize(("data", "freeze", "frozen"), [
    ("drawn", "base:2", ("base.0.", "base.1.")), ("voc", "base", ("base.",)), ("coco", "", ()),
    ("yolo-list", "heads", ("loc.", "conf.")), ("cvat", "base:1", ("base.0.",)),
])
def test_options_of_training_act_alike_on_all_data(data, freeze, frozen, tmp_path, monkeypatch):
    monkeypatch.setitem(BACKBONES, "tiny", TINY)
    DATA[data](root := tmp_path / "data")
    losses, loss = [], MultiBoxLoss.loss

    def keep(self, predictions, labels, offsets, count):
        result = loss(self, predictions, labels, offsets, count)
        losses.append((predictions[1].detach(), labels, count, result[1].item()))
        return result

    monkeypatch.setattr(MultiBoxLoss, "loss", keep)
    words = ["--root", str(root), "--save_folder", str(tmp_path), f"--freeze={freeze}", *(
        "-v tiny -s 300 -b 2 --accumulate 2 --recipe modern --warm_epoch 0 --weight_decay 0 "
        "--lr 1e-3 --base_lr 0.1 --clip_norm 0.01 --ema 0.9 --priors fit --patience 1 --date a "
        "--background_negatives 30000 --cache memory --test_frequency 0 --device cpu "
        "--num_workers 0 --resume auto").split()]
    last = tmp_path / "tiny_300/a/last.pth"
    assert main([*words, "--max_hours", "1e-9"]) == 0
    one = load_checkpoint(last)
    assert main([*words, "--max_iters", "2"]) == 0
    two = load_checkpoint(last)
    assert (one["step"], two["step"], len(losses)) == (1, 2, 4)
    assert check.main(["--root", str(root), "-s", "300", "--fit_priors", str(tmp_path / "p")]) < 2
    sizes = json.loads((tmp_path / "p").read_text())["300"]
    assert one["config"]["priors"] == sizes

    torch.manual_seed(0)
    net = build_net("tiny", 300, 4)
    new = net.state_dict()
    for weights in (each[kind] for each in (one, two) for kind in ("model", "raw_model")):
        assert all(torch.equal(weights[key], new[key]) for key in new if key.startswith(frozen))
    trained = {key for key, _ in net.named_parameters() if not key.startswith(frozen)}
    first_step = [each["exp_avg"] for each in one["optimizer"]["state"].values()]
    assert sum(map(torch.numel, first_step)) == sum(new[key].numel() for key in trained)
    # The first step of Adam moves by the learning rate, and its average is a tenth of the gradient.
    for rate, in_base in ((1e-4, True), (1e-3, False)):
        keys = [key for key in trained if key.startswith("base.") == in_base]
        moved = [(one["raw_model"][key] - new[key]).abs().max().item() for key in keys]
        assert not keys or max(moved) == pytest.approx(rate, rel=0.01)
    assert torch.cat([*map(torch.flatten, first_step)]).norm() == pytest.approx(1e-3, rel=1e-3)
    for conf, labels, count, found in losses:  # all but one of an image's prior boxes at the most
        entropy = torch.nn.functional.cross_entropy(conf[0], labels[0], reduction="sum").item()
        assert count == 20_000 and found == pytest.approx(entropy / 20_000, rel=1e-3)
