"""Image sets that nothing declares, the layout that a root holds, and what contradicts it."""

import json
import shutil

import pytest
from conftest import write_voc
from test_yolo import CAT, write

from data import DATASETS, build_dataset, default_sets, find_layout
from data.image_sets import ImageSet
from data.split import SPLIT_SETS, in_validation, listed
from engine.options import Options, parse
from engine.resolve import check_parts, dataset_of_test, resolve
from engine.run import find_checkpoint, log_dataset
from tools import split
from tools.split import main
from utils.errors import UserError

DOG = [("dog", (5, 5, 40, 40))]


def chosen(paths: list[str], *rule: object) -> set[str]:
    return {path for path, val in zip(paths, in_validation(paths, *rule), strict=True) if val}


def test_split_depends_on_names_alone():
    # sha256 of "a" to "e" begins with ca, 3e, 2e, 18, 3f.
    names = ["a.jpg", "b.jpg", "x/c.png", "d.jpg", "e.jpg"]
    assert chosen(names) == {"d.jpg"}
    assert chosen(names, 0.4) == chosen(names[::-1], 0.4) == {"d.jpg", "x/c.png"}
    assert chosen(["images\\c.webp", "e\u0301.jpg", "\u00e9.png", "a.x"], 0.1) == {"images\\c.webp"}
    assert chosen(names, 0.99) == {*names} - {"a.jpg"}  # never empty on either side


# sha256: c_2 06, d 18, c_1 2c, c 2e, 1 6b, d_2 72, d_1 86, f/ 8f, 2 d4.
@pytest.mark.parametrize("pattern, val", [
    (r"[^_]+", {"d_1.jpg", "d_2.jpg"}), (r"\w+_(\d)", {"d_1.jpg", "f/c_1.jpg"}),
    ("f/", {"d_2.jpg"}), ("z*", {"f/c_2.jpg"}), ("none", {"f/c_2.jpg"}),
])  # fmt: skip
def test_images_of_a_group_stay_on_one_side(pattern, val):
    assert chosen(["d_1.jpg", "d_2.jpg", "f/c_1.jpg", "f/c_2.jpg"], 0.2, pattern) == val


@pytest.mark.parametrize("names, rule, words", [
    (["a.jpg", "a.png"], (0.2,), "one group a"), (["f_1.jpg", "f_2.jpg"], (0.2, "f"), "--split_by"),
    ([], (0.2,), "no image"), (["a.jpg"], (0.2,), "one image add"),
    (["a.jpg"], (1.5,), "--val_share 1.5"), (["a.jpg"], (0.2, "("), "'('"),
    (["a.jpg"], (float("nan"),), "nan"), (["a.jpg"], ("x",), "'x'"),
])  # fmt: skip
def test_split_that_cannot_be_is_refused(names, rule, words):
    with pytest.raises(UserError) as error:
        in_validation(names, *rule)
    assert all(word in str(error.value) for word in words.split())


NAMES = ["images/train/a.jpg", "images/val/a.jpg", "images/val/\u00e9.b.png", "c.jpg"]


@pytest.mark.parametrize("line, found", [
    ("c", [3]), ("./c.jpg", [3]), ("images\\train\\a", [0]), ("/x/data/images/val/a.jpg", [1]),
    ("e\u0301.b", [2]), ("val/e\u0301.b.png\nc\nc.jpg", [2, 3]),
    ("a", "fits images/train/a.jpg images/val/a.jpg :1"), ("c\ngone", '"gone" :2'),
    ("", "no image"),
])  # fmt: skip
def test_line_of_a_list_is_a_path_or_its_end(line, found, tmp_path):
    (tmp_path / "own.txt").write_text(line)
    if isinstance(found, list):
        assert listed(tmp_path / "own.txt", NAMES) == found
        return
    with pytest.raises(UserError) as error:
        listed(tmp_path / "own.txt", NAMES)
    assert all(word in str(error.value) for word in ["own.txt", *found.split()])


@pytest.mark.parametrize("sets, train, test", [
    ("train val test", "train", "val"), ("trainval test", "trainval", "test"),
    ("train test", "train", "test"), ("train dev validation", "train", "validation"),
    ("Train2017 val2017", "Train2017", "val2017"), ("train", "split_train", "split_val"),
    ("default", "split_train", "split_val"), ("train1 train_2 val_1", "train1 train_2", "val_1"),
])  # fmt: skip
def test_default_sets_are_declared_ones_or_parts(sets, train, test, tmp_path):
    write_voc(tmp_path, {name: {f"{name}{i}": DOG for i in range(3)} for name in sets.split()})
    if "train1" in sets:
        folds = "train1 train2 val1 val2".split()
        write_voc(tmp_path / "folds", {name: {name: DOG} for name in folds})
        with pytest.raises(UserError, match=r"train1\+train2\+val1\+val2.*--train_sets"):
            default_sets("VOC", tmp_path / "folds")
    asked = tuple(ImageSet(None, name) for name in train.split())
    assert default_sets("VOC", tmp_path) == (asked, (ImageSet(None, test),))
    data = build_dataset("VOC", tmp_path, [(None, test)], val_share=0.5)
    assert len(data) == (2 if test == "split_val" else 3)


def test_lists_of_the_command_decide_from_then_on(tmp_path, capsys):
    write(tmp_path, {f"one/{name}": CAT for name in "abcde"}, "train: images\nnames: [cat]")

    def parts(**options):
        data = [build_dataset("YOLO", tmp_path, [(None, f"split_{name}")], **options)
                for name in ("train", "val")]
        return [{part.image_path(i).stem for i in range(len(part))} for part in data]

    before = parts(val_share=0.5)
    assert main(["--root", str(tmp_path), "--val_share", "0.5"]) == 0
    assert parts() == before and len(before[1]) == 3
    assert "split_val.txt" in capsys.readouterr().out
    assert main(["--root", str(tmp_path)]) == 2 and "delete" in capsys.readouterr().err
    lines = (tmp_path / "ImageSets/split_train.txt").read_text()
    (tmp_path / "ImageSets/split_train.txt").unlink()
    assert parts() == before  # the rest of the other list
    with open(tmp_path / "ImageSets/split_val.txt", "a") as file:
        file.write(lines)
    with pytest.raises(UserError, match=r"split_val\.txt.*split_train|no image"):
        parts()


def test_full_disk_leaves_no_list_or_the_log_says_that_it_decides(tmp_path, monkeypatch, capsys):
    write(tmp_path, {f"one/{name}": CAT for name in "abcde"}, "train: images\nnames: [cat]")
    train, val = (tmp_path / f"ImageSets/split_{name}.txt" for name in ("train", "val"))
    real = split.atomic_write

    def atomic_write(path):
        if path == val:
            raise UserError(f"{path}: cannot be written (No space left on device); make room")
        return real(path)

    monkeypatch.setattr(split, "atomic_write", atomic_write)
    assert main(["--root", str(tmp_path)]) == 2
    assert not train.exists() and capsys.readouterr().out == ""

    def logged(name):
        sets = (ImageSet(None, name),)
        options = Options(dataset="YOLO", root=str(tmp_path), train_sets=sets)
        return log_dataset(build_dataset("YOLO", tmp_path, sets), options, "train_sets")[0]

    assert "0.2" in logged("split_train") and "--val_share" in logged("split_train")
    train.write_text("a\nb\n")  # of a killed call
    for name in SPLIT_SETS:
        assert str(train) in logged(name) and "0.2" not in logged(name)


def test_names_that_end_alike_and_classes_without_names_are_divided(tmp_path):
    write(tmp_path / "in", {f"{folder}{name}": CAT for folder in "xy" for name in "abcd"}, "")
    (tmp_path / "sub").mkdir()
    for kind in ("images", "labels"):
        for path in (tmp_path / "in" / kind).glob("*.*"):
            folder, name = path.stem
            path.rename(tmp_path / ("sub" if folder == "y" else "") / f"{name}{path.suffix}")
    shutil.rmtree(tmp_path / "in")
    assert main(["--root", str(tmp_path), "--classes", "cat"]) == 0
    sizes = [len(build_dataset("YOLO", tmp_path, [(None, name)], ["cat"]))
             for name in ("split_train", "split_val")]
    assert sum(sizes) == 8 and min(sizes) > 0


def test_root_decides_the_layout_and_a_given_one_must_not_contradict(tmp_path):
    write(tmp_path / "in/yolo", {"train/a": CAT})
    write_voc(tmp_path / "voc", {"trainval": {"a": DOG}, "test": {"b": DOG}})
    root = str(tmp_path / "in/yolo")
    shutil.make_archive(str(tmp_path / "a"), "zip", root)
    options = resolve({"root": root})
    assert (options.dataset, options.priors, options.max_epoch) == ("YOLO", "VOC", 300)
    assert (options.train_sets, options.test_sets) == (((None, "train"),), ((None, "val"),))
    assert resolve({"root": str(tmp_path / "voc")}).dataset == "VOC"
    for given, words in (
        ({"root": root, "dataset": "VOC"}, ["YOLO (data.yaml)", "-d VOC", "-d YOLO"]),
        ({"root": str(tmp_path / "in")}, ["YOLO (data.yaml)", str(tmp_path / "in/yolo")]),
        ({"root": f"{root}/data.yaml"}, ["data.yaml is a file", root]),
        ({"root": str(tmp_path / "a.zip")}, ["a.zip is a zip file", "unpack"]),
        ({"root": str(tmp_path / "in/yolo/labels")}, ["COCO", "CVAT", "docs/own_data.md"]),
    ):
        with pytest.raises(UserError) as error:
            resolve(given)
        assert all(word in str(error.value) for word in words), error.value
    write_voc(tmp_path / "in/yolo", {"train": {"a": DOG}})
    with pytest.raises(UserError, match=r"VOC.*-d VOC.*YOLO.*-d YOLO"):
        find_layout(root)
    assert resolve({"root": root, "dataset": "YOLO"}).dataset == "YOLO"
    assert dataset_of_test({"root": root}, "VOC") == "VOC"
    assert dataset_of_test({"root": str(tmp_path / "voc")}, "YOLO") == "VOC"
    assert dataset_of_test({"root": root, "dataset": "COCO"}, "VOC") == "COCO"
    assert dataset_of_test({}, "CVAT") == "CVAT"


@pytest.mark.parametrize("kinds", ["a:yolo", "a:yolo b:voc", "a:yolo b:yolo c:voc", "a:voc b:voc",
                                   "a:bare b:bare", "a:bare b:voc"])
def test_folder_of_data_sets_is_refused_with_their_names(kinds, tmp_path):
    (tmp_path / "notes.txt").write_text("several")
    (tmp_path / "notes.json").write_text('{"by": "me", "images": [1]}')
    for name, kind in (each.split(":") for each in kinds.split()):
        if kind != "voc":
            write(tmp_path / name, {"train/a": CAT}, **{"yaml": ""} if kind == "bare" else {})
        else:
            write_voc(tmp_path / name, {"train": {name: DOG}})
    with pytest.raises(UserError) as error:
        resolve({"root": str(tmp_path)})
    names = {"yolo": "YOLO (data.yaml)", "bare": "YOLO (images and labels)",
             "voc": "VOC XML in Annotations/"}
    words = [f"{name} ({names[kind]})" for name, kind in (e.split(":") for e in kinds.split())]
    assert all(word in str(error.value) for word in words), error.value
    assert str(tmp_path / "a") in str(error.value) and "--root" in str(error.value)


def test_folders_of_labels_beside_images_are_one_data_set(tmp_path):
    for film in ("film1", "film2"):
        write(tmp_path / "from", {f"{film}/a": CAT}, yaml="")
        (tmp_path / film).mkdir()
        for part in (f"images/{film}/a.png", f"labels/{film}/a.txt"):
            (tmp_path / "from" / part).rename(tmp_path / film / part.rpartition("/")[2])
    shutil.rmtree(tmp_path / "from")
    assert find_layout(tmp_path) == ("YOLO", "YOLO (images and labels beside)")


@pytest.mark.parametrize("root", ["x" * 5000, "\ud800", "/dev/null/x"])
@pytest.mark.parametrize("dataset", DATASETS)
def test_root_that_no_file_system_takes_is_refused_by_its_reader(root, dataset):
    options = resolve({"root": root, "dataset": dataset})
    assert resolve({"root": root}).dataset == "VOC"
    with pytest.raises(UserError):
        build_dataset(dataset, options.root, options.train_sets)


def test_part_beside_another_set_is_refused(voc_folder):
    for train, test, said in (("split_train", "test", "split_train.*test"),
                              ("test", "split_val", "test.*split_val"),
                              ("foo", "split_val", '"foo" in .*; existing .*trainval')):
        sets = [(ImageSet(None, name),) for name in (train, test)]
        with pytest.raises(UserError, match=said):
            check_parts(Options(root=str(voc_folder), train_sets=sets[0], test_sets=sets[1]))
    check_parts(Options(train_sets=(ImageSet(None, "split_train"),),
                        test_sets=(ImageSet(None, "split_val"),)))
    assert parse(["--val_share", ".3", "--split_by", "a"])[1] == {"val_share": 0.3, "split_by": "a"}


def test_resume_auto_knows_a_run_by_the_layout_of_its_root(tmp_path):
    root = write(tmp_path / "yolo", {"train/a": CAT})
    run = tmp_path / "w/SSD_HarDNet68_512/a"
    run.mkdir(parents=True)
    (run / "last.pth").write_bytes(b"")
    args = ["--resume", "auto", "--root", str(root), "--save_folder", str(tmp_path / "w")]
    (run / "config.json").write_text(json.dumps({"dataset": "VOC", "root": str(root)}))
    assert not find_checkpoint(*parse(args))
    (run / "config.json").write_text(json.dumps({"dataset": "YOLO", "root": str(root)}))
    with pytest.raises(UserError, match=r"last\.pth"):  # found, and damaged
        find_checkpoint(*parse(args))
