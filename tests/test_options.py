"""Options: one declaration each, one rule each, and what contradicts what."""

import dataclasses
from pathlib import Path

import pytest

from data import DATASETS
from data.image_sets import ImageSet
from engine import resolve as resolving
from engine.declare import flag_of
from engine.options import OPTIONS, RECIPES, Call, Options, default_text, parse, parser
from engine.resolve import check_resumed, check_training, dataset_options, resolve
from layers.detect import DetectConfig
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("tiny")


# ---------------------------------------------------------------- declarations


def test_every_option_is_declared_once_and_fits_its_own_rule():
    flags = [flag for spec in OPTIONS.values() for flag in spec.metadata["flags"]]
    assert len(flags) == len(set(flags))
    assert dataclasses.asdict(Options(**dataclasses.asdict(Options()))) == dataclasses.asdict(
        Options()
    )
    assert not {s.name for s in dataclasses.fields(Call)} & {
        s.name for s in dataclasses.fields(Options) if s.metadata["flags"]
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_sets_options_that_are_there_to_values_that_can_be(recipe):
    assert RECIPES[recipe].keys() <= {spec.name for spec in dataclasses.fields(Options)}
    options = resolve({"recipe": recipe})
    assert {key: getattr(options, key) for key in RECIPES[recipe]} == RECIPES[recipe]


def test_published_spellings_are_accepted():
    line = (
        "-v SSD_HarDNet85 -s 512 -d COCO -b 16 --learning-rate 0.001 -max 7 -we 2 --cuda false "
        "--ngpu 1 --visdom true --send_images_to_visdom no --log_iters true --gamma 0.2 "
        "--save_frequency 5 --test_frequency 3 --jaccard_threshold 0.4 --retest false --date 0504 "
        "--eval_backend hotcoco"
    )
    call, given = parse(line.split())
    assert given == {
        "version": "SSD_HarDNet85", "size": 512, "dataset": "COCO", "batch_size": 16, "lr": 1e-3,
        "max_epoch": 7, "warm_epoch": 2, "visdom": True, "send_images_to_visdom": False,
        "log_iters": 10, "gamma": 0.2, "save_frequency": 5, "test_frequency": 3,
        "jaccard_threshold": 0.4,
    }  # fmt: skip
    assert call == Call(cuda=False, ngpu=1, date="0504", eval_backend="hotcoco")


def test_help_has_the_default_of_every_data_set_and_recipe():
    assert default_text(OPTIONS["lr"]) == "0.004; modern: 0.001"
    assert default_text(OPTIONS["weight_decay"]) == "0.0005 VOC, 0.0001 COCO; modern: 0.05"
    assert default_text(OPTIONS["max_epoch"]) == "300 VOC, 150 COCO"
    text = " ".join(parser().format_help().split())
    for spec in OPTIONS.values():
        assert flag_of(spec) in text
        assert f"(default: {default_text(spec)})" in text or not default_text(spec)


@pytest.mark.parametrize(
    "line",
    [["-v", "SSD_resnet"], ["-s", "400"], ["-b", "0"], ["--lr", "nan"], ["--lr", "-1"],
     ["--seed", "x"], ["--cuda", "maybe"], ["--jaccard_threshold", "1.5"], ["--unknown"],
     ["--date", "a/b"]],
)  # fmt: skip
def test_text_that_is_no_value_is_refused_by_the_parser(line, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(line)
    assert exit.value.code == 2
    assert line[-1].lstrip("-") in capsys.readouterr().err


BAD_VALUES = [("size", 400), ("size", True), ("size", 512.0), ("amp", ["off"]), ("lr", "fast"),
              ("lr", float("nan")), ("lr", -1.0), ("momentum", 5), ("overfit", -1),
              ("batch_size", 0), ("batch_size", 2.5), ("test_sets", [5]), ("train_sets", [["a"]]),
              ("train_sets", "trainval"), ("classes", "cell"), ("classes", [1]), ("root", 3),
              ("root", "a\0"), ("priors", "X"), ("batch_size", True), ("visdom", 1),
              ("visdom", "yes please")]


@pytest.mark.parametrize("name, value", BAD_VALUES)
def test_a_value_keeps_its_rule_from_python_and_from_a_checkpoint(name, value):
    for make in (lambda: Options(**{name: value}),
                 lambda: Options.of({"config": {name: value}, name: value}, Path("run/last.pth"))):
        with pytest.raises(UserError) as error:
            make()
        shown = value[0] if isinstance(value, list) else value
        assert repr(shown) in str(error.value) or str(shown) in str(error.value)
    assert "run/last.pth" in str(error.value)


def test_a_configuration_comes_back_from_its_plain_form():
    options = resolve({"recipe": "modern", "train_sets": "2012_train,own", "classes": "a,b"})
    saved = {"config": options.plain(), "classes": ["a", "b"]}
    assert Options.of(saved, Path("x")) == options
    without = {key: value for key, value in options.plain().items() if key != "clip_norm"}
    assert Options.of({"config": without}, Path("x")).clip_norm == 0
    for config in (None, [], 5):
        with pytest.raises(UserError, match=r"x\.pth"):
            Options.of({"config": config}, Path("x.pth"))


# ---------------------------------------------------------------- what wins


def test_given_comes_before_stored_before_recipe_before_data_set_before_default(tmp_path):
    stored = {"version": "tiny", "size": 300, "dataset": "VOC", "lr": 0.5, "seed": 3}
    options = resolve({"lr": 0.1, "root": str(tmp_path)}, stored)
    assert (options.lr, options.seed, options.momentum, options.max_epoch) == (0.1, 3, 0.9, 300)
    coco = resolve({"dataset": "COCO"})
    assert (coco.max_epoch, coco.weight_decay, coco.priors) == (150, 1e-4, "COCO")
    assert coco.root == str(Path.home() / "data" / "COCO")
    assert coco.train_sets == (ImageSet("2017", "train"),)
    assert resolve({"dataset": "COCO", "recipe": "modern"}).weight_decay == 0.05


@pytest.mark.parametrize("machine, kept, expected",
                         [(2, {}, 2), (64, {}, 8), (2, {"num_workers": 6}, 6)])
def test_a_core_has_one_loading_process_unless_asked(monkeypatch, machine, kept, expected):
    monkeypatch.setattr(resolving, "cores", lambda: machine)
    assert resolve({}, kept).num_workers == expected
    assert resolve({"num_workers": 9}, kept).num_workers == 9


def test_image_sets_follow_the_root_and_what_it_holds(tmp_path, voc_folder):
    assert resolve({"root": str(voc_folder)}).test_sets == (ImageSet(None, "test"),)
    published = (ImageSet("2007", "trainval"), ImageSet("2012", "trainval"))
    assert resolve({"root": str(tmp_path / "gone")}).train_sets == published
    given = {"root": str(tmp_path / "gone"), "train_sets": "2012_train, 2007_trainval,own_set"}
    assert list(map(str, resolve(given).train_sets)) == ["2012_train", "2007_trainval", "own_set"]
    (voc_folder / "ImageSets/Main/2024_train.txt").write_text("b1\n")
    given = {"root": str(voc_folder), "train_sets": "2024_train"}
    assert resolve(given).train_sets == (ImageSet(None, "2024_train"),)


def test_detection_options_change_the_published_settings():
    call, _ = parse("--test x.pth --score_threshold 0 --nms soft --max_detections 7".split())
    published = DetectConfig(**DATASETS["VOC"].detection)
    config = dataclasses.replace(published, **call.given_detection)
    assert (config.conf_thresh, config.nms, config.top_k, config.nms_thresh) == (0, "soft", 7, 0.45)
    assert not Call(test="x.pth").given_detection


# ---------------------------------------------------------------- contradictions


def refusal(*line: str) -> str:
    """Return what is said of a training or testing call that contradicts itself."""
    with pytest.raises(UserError) as error:
        call, given = parse(list(map(str, line)))
        if not call.test:
            check_training(call, given)
        dataset_options(resolve(given), call, bool(call.test))
        call.device_name()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("line, words", [
    ("--cuda true --device cpu", "--cuda True --device cpu"),
    ("--basenet gone.pth", "gone.pth hardnet68_base_bridge.pth weights/README.md"),
    ("--basenet a.pth --resume_net b.pth", "--basenet --resume_net"),
    ("--resume last.pth --basenet a.pth", "--resume --basenet"),
    ("--score_threshold 0", "--score_threshold --test"),
    ("--nms soft", "--nms --test"),
    ("--retest", "--retest --test"),
    ("--eval-backend hotcoco", "--eval-backend VOC"),
    ("--crowds false", "--crowds VOC"),
    ("--resume_net gone.pth", "gone.pth"),
    ("--resume_epoch 3", "--resume_epoch --resume_net"),
    ("--class_map a=b", "--class_map --resume_net"),
    ("--train_sets ,", "image set"), ("--train_sets=", "image set"), ("--test=", "--test empty"),
    ("--resume=", "--resume empty"), ("--basenet=", "--basenet"),
    ("--send_images_to_visdom", "--send_images_to_visdom --visdom"),
    ("--optimizer adamw", "--optimizer adamw --lr --weight_decay"),
    ("-v SSD_mobile -s 512", "512 --size"),
    ("--test x.pth --lr 5 --max_iters 3 --ema .9", "--test --lr --max_iters --ema"),
    ("--test x.pth --lr 0.004", "--test --lr"),
    ("--test x.pth --cache memory --train_sets nowhere", "--test --cache --train_sets"),
    ("--test x.pth --resume auto", "--test --resume"),
    ("--test x.pth --overfit 3 --basenet y.pth", "--test --overfit --basenet"),
])
def test_a_call_that_contradicts_itself_is_refused_in_one_sentence(line, words):
    said = refusal(*line.split())
    assert all(word in said for word in words.split()), said


def test_a_switch_that_is_off_asks_for_nothing():
    call, given = parse(["--retest", "false"])
    check_training(call, given)
    assert parse("--test x.pth --compile false".split())[0].test == "x.pth"


@pytest.mark.parametrize("key, value", [("version", "SSD_vgg"), ("size", 512), ("classes", "a,b")])
def test_what_a_checkpoint_is_made_for_cannot_be_changed(key, value):
    stored = {"version": "tiny", "size": 300, "classes": ["cell"]}
    with pytest.raises(UserError) as error:
        resolve({key: value}, stored)
    assert f"--{key}" in str(error.value) and str(stored[key]) in str(error.value)


def test_a_root_that_the_checkpoint_cannot_read_is_told_apart_from_a_given_layout(voc_folder):
    for given, stored, words in (({}, {"dataset": "COCO"}, ["the checkpoint", "-d COCO", "VOC"]),
                                 ({"dataset": "COCO"}, {}, ["give -d VOC"])):
        with pytest.raises(UserError) as error:
            resolve({"root": str(voc_folder), **given}, stored)
        assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "given",
    [{"recipe": "modern"}, {"ema": 0.5}, {"crowds": False}, {"overfit": 2}, {"batch_size": 3},
     {"seed": 1}, {"optimizer": "adamw"}, {"norm_decay": False}, {"train_sets": "other"}],
)  # fmt: skip
def test_a_resumed_run_keeps_what_its_state_and_order_depend_on(given):
    stored = resolve({"train_sets": "trainval"})
    check_resumed({key: getattr(stored, key) for key in given}, stored)
    check_resumed({"lr": 5.0, "max_epoch": 7, "num_workers": 3}, stored)
    with pytest.raises(UserError) as error:
        check_resumed(given, stored)
    ((key, value),) = given.items()
    assert f"--{key} {value}" in str(error.value)
