"""Every option of train_test.py, declared once.

``Options`` holds what a run is made with: a checkpoint stores it, and a resumed run reads it back.
``Call`` holds what one call asks for. Both classes declare an option by one field: its default, its
flags, its rule and its help. The command line, ``--help``, the README's table and the rules of
``resolve`` follow from the fields.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data import DATASETS
from data.coco_eval import BACKENDS
from data.image import MAX_PIXELS
from data.image_sets import ImageSet
from data.split import VAL_SHARE, check_pattern, check_share
from data.transforms import SSDAugmentation
from engine.declare import Checked, flag_of, option
from engine.rules import names, parts, priors, sets, tracker_names
from layers.detect import SUPPRESSION, DetectConfig
from models import BACKBONES, SIZES
from utils.arguments import (
    Parser,
    boolean,
    count,
    folder_name,
    fraction,
    number,
    positive,
    steps_or_boolean,
)
from utils.device import AMP_TYPES
from utils.errors import UserError

RECIPES = {
    "published": {},
    "modern": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "schedule": "cosine",
               "warm_epoch": 3, "norm_decay": False, "ema": 0.9998},
}
"""Values that a recipe gives to options, unless they are given on the command line."""

_what = partial(option, "what")
_testing = partial(option, "testing", only="test")
_starting = partial(option, "where training starts", only="train")
_recipe = partial(option, "recipe", only="train")
_machine = partial(option, "machine", machine=True)
_output = partial(option, "output")


@dataclass(frozen=True)
class Options(Checked):
    """What a run is made with."""

    # fmt: off
    version: str = _what("SSD_HarDNet68", "-v", "--version", choices=BACKBONES, help="network")
    size: int = _what(512, "-s", "--size", read=int, choices=SIZES,
        help="side of the square network input, in pixels")
    dataset: str = _what("VOC", "-d", "--dataset", choices=DATASETS,
        help="layout of the data; also selects the published settings (default: what --root holds; "
             "VOC without --root)")
    root: str = _what("", "--root", metavar="DIR",
        help="folder of the data (default: ~/data/VOCdevkit, ~/data/COCO)")
    classes: tuple[str, ...] | None = _what(None, "--classes", metavar="NAMES", check=names,
        help="a,b,c or a file with one name a line (default: the classes that the data set "
             "declares, else those that its annotations contain)")
    train_sets: tuple[ImageSet, ...] = _what((), "--train_sets", metavar="SETS", check=sets,
        only="train", fixed=True,
        help="e.g. 2007_trainval,2012_trainval, or train (default: those that the data declare, "
             "else split_train)")
    test_sets: tuple[ImageSet, ...] = _what((), "--test_sets", metavar="SETS", check=sets,
        help="e.g. 2007_test, or test (default: those that the data declare, else split_val)")
    val_share: float = _what(VAL_SHARE, "--val_share", read=number, metavar="X", check=check_share,
        fixed=True, help="share of the images in split_val, where the data declare no set to test "
             "on; split_train has the others")
    split_by: str | None = _what(None, "--split_by", metavar="REGEX", check=check_pattern,
        fixed=True, help="keep images with the same match on one side, such as the frames of a "
             "film: '[^_]+' takes what comes before the first _ of a file name")
    priors: str = _what("VOC", "--priors", metavar="VOC|COCO|fit|FILE", check=priors,
        only="train", fixed=True,
        help="prior boxes: of VOC or COCO (default: as -d), fit to the training boxes, or a file "
             "of tools.check --fit_priors")
    crowds: bool = option("what", True, "--crowds", read=boolean, only="train", fixed=True,
        help="COCO: train on crowds as on other boxes, as published; 'false' leaves them out")

    recipe: str = _recipe("published", "--recipe", choices=RECIPES, fixed=True,
        help="defaults of the options below; docs/recipes.md compares them")
    batch_size: int = option("recipe", 32, "-b", "--batch_size", read=positive, metavar="N",
        fixed=True, help="images a step, over all GPUs and accumulation steps")
    accumulate: int = _recipe(1, "--accumulate", read=positive, metavar="N", machine=True,
        help="parts that the images of a step are cut into, for less memory")
    max_epoch: int = _recipe(300, "-max", "--max_epoch", read=positive, metavar="N", help="epochs")
    optimizer: str = _recipe("sgd", "--optimizer", choices=("sgd", "adamw"),
        fixed=True, help="optimiser")
    lr: float = _recipe(4e-3, "--lr", "--learning-rate", read=number, metavar="X",
        help="initial learning rate")
    base_lr: float = _recipe(1.0, "--base_lr", read=number, metavar="X", fixed=True,
        help="factor of the learning rate of the base network")
    freeze: str = _recipe("", "--freeze", read=parts, metavar="PARTS", fixed=True,
        help="parts whose weights and batch statistics stay: base, base:K (its first K layers) or "
             "heads")
    momentum: float = _recipe(0.9, "--momentum", read=fraction, metavar="X",
        help="momentum of SGD; first beta of AdamW")
    weight_decay: float = _recipe(5e-4, "--weight_decay", read=number, metavar="X",
        help="weight decay")
    gamma: float = _recipe(0.1, "--gamma", read=number, metavar="X",
        help="factor of the learning rate at 60, 80 and 90 %% of the epochs (--schedule steps)")
    warm_epoch: int = _recipe(0, "-we", "--warm_epoch", read=count, metavar="N",
        help="epochs of linear warm-up from 1e-6")
    schedule: str = _recipe("steps", "--schedule", choices=("steps", "cosine"),
        help="learning rate after the warm-up")
    norm_decay: bool = _recipe(True, "--norm_decay", read=boolean, fixed=True,
        help="apply weight decay to biases and to the weights of norms, too")
    ema: float = _recipe(0.0, "--ema", read=fraction, metavar="X", fixed=True,
        help="test and keep a moving average of the weights with this decay a step; 0: none")
    clip_norm: float = _recipe(0.0, "--clip_norm", read=number, metavar="X",
        help="largest norm of a step's gradient; 0: any")
    jaccard_threshold: float = _recipe(0.5, "--jaccard_threshold", read=fraction, metavar="X",
        help="lowest IoU of a positive prior box")
    background_negatives: int = _recipe(0, "--background_negatives", read=count, metavar="N",
        help="least number of hard negatives an image; 0: as published, three for each positive "
             "prior box, so that an image without objects teaches nothing")
    expansion: float = _recipe(SSDAugmentation.expansion, "--expansion", read=fraction,
        metavar="X", fixed=True,
        help="share of the training images that are shrunk, at most to a sixteenth of their area; "
             "0 suits objects that are always seen from the same distance")
    patience: int = _recipe(0, "--patience", read=count, metavar="N",
        help="end after N evaluations in a row without a better AP; 0: train all epochs")
    seed: int = _recipe(0, "--seed", read=count, metavar="N", fixed=True,
        help="seed of weights, order and augmentation")
    overfit: int = _recipe(0, "--overfit", read=count, metavar="N", fixed=True,
        help="train and test on the first N training images without augmentation: a correct set-up "
             "learns them by heart; 0: train as usual")

    sync_bn: bool = _machine(False, "--sync_bn", read=boolean, only="train",
        help="compute batch norms over the images of all processes (GPUs)")
    num_workers: int = _machine(8, "--num_workers", read=count, metavar="N",
        help="processes that load images, by default no more than cores")
    amp: str = _machine("off", "--amp", choices=AMP_TYPES,
        help="precision of the network; bf16 is about twice as fast on CPUs that have it")
    compile: bool = _machine(False, "--compile", read=boolean, only="train",
        help="train through torch.compile")
    recompute: bool = _machine(False, "--recompute", read=boolean, only="train",
        help="compute concatenations again in the backward pass instead of keeping them: less "
             "memory, more time, the same numbers (not with --compile)")
    max_pixels: int = _machine(MAX_PIXELS, "--max_pixels", read=positive, metavar="N",
        help="refuse images with more pixels before they are decoded; over 2^30 set "
             "OPENCV_IO_MAX_IMAGE_PIXELS, too")
    cache: str = _machine("off", "--cache", metavar="off|memory|DIR", only="train",
        help="keep the decoded training images in shared memory or in a folder, if they fit")

    save_folder: str = _output("weights/", "--save_folder", metavar="DIR",
        help="folder of all runs")
    save_frequency: int = _output(10, "--save_frequency", read=count, metavar="N", only="train",
        help="epochs between kept checkpoints; 0: none")
    save_minutes: int = _output(10, "--save_minutes", read=count, metavar="N", only="train",
        help="minutes between saves of last.pth inside an epoch; 0: none")
    test_frequency: int = _output(10, "--test_frequency", read=count, metavar="N", only="train",
        help="epochs between evaluations (and one at the end); 0: none, and no test set")
    log_iters: int = _output(10, "--log_iters", read=steps_or_boolean, metavar="N",
        help="steps between log lines where output is no terminal; 0: none")
    log: str = _output("", "--log", read=tracker_names, metavar="NAMES", only="train",
        help="send numbers to tensorboard, wandb, mlflow, trackio, or several with commas")
    visdom: bool = _output(False, "--visdom", read=boolean, only="train",
        help="the same as --log tensorboard")
    send_images_to_visdom: bool = _output(False, "--send_images_to_visdom", read=boolean,
        only="train", help="with --log: also training images with their boxes, and detections")

    ngpu: int = option("recorded", 1, help="processes that trained", read=positive)
    start: str = option("recorded", "", help="where the first weights came from")
    # fmt: on

    @property
    def trackers(self) -> list[str]:
        """The trackers of --log; --visdom is the published name of TensorBoard's."""
        asked = ["tensorboard"] * self.visdom + self.log.split(",")
        return list(dict.fromkeys(filter(None, asked)))

    @property
    def num_classes(self) -> int:
        """Number of classes with background."""
        return len(self.classes) + 1

    @property
    def network(self) -> str:
        """Name of the network at its size, for folders and files."""
        return f"{self.version}_{self.size}"

    def plain(self) -> dict:
        """Return the options as a dict that JSON and a checkpoint can hold."""
        values = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        lists = {key: [list(s) for s in values[key]] for key in ("train_sets", "test_sets")}
        return {**values, **lists, "classes": list(self.classes) if self.classes else None}

    @classmethod
    def of(cls, saved: Mapping[str, object], path: Path) -> Options:
        """Return the options that the checkpoint ``saved``, read from ``path``, was made with.

        An option that the file does not have takes its default.

        Raises:
            UserError: the file has no configuration, or a value breaks its option's rule.
        """
        config = saved.get("config")
        if not isinstance(config, Mapping):
            raise UserError(f"{path} has no configuration; is it a checkpoint of this program?")
        known = {spec.name for spec in dataclasses.fields(cls)}
        values = {key: value for key, value in config.items() if key in known}
        try:
            return cls(**{**values, "classes": saved.get("classes")})
        except UserError as error:
            raise UserError(f"{path}: its configuration cannot be read: {error}") from error


@dataclass(frozen=True)
class Call(Checked):
    """What one call asks for; a checkpoint does not keep it."""

    # fmt: off
    test: str | None = option("testing", None, "--test", metavar="FILE",
        help="evaluate this checkpoint or exported file instead of training")
    retest: bool = _testing(False, "--retest", read=boolean,
        help="score the detections of an earlier --test again")
    conf_thresh: float | None = _testing(None, "--score_threshold", read=fraction, metavar="X",
        help="lowest score of a detection (default: 0.03 VOC, 0.02 COCO)")
    nms: str | None = _testing(None, "--nms", choices=SUPPRESSION,
        help="treatment of overlapping boxes of a class: hard drops them, soft and soft-gaussian "
             "lower their scores (default: hard)")
    class_agnostic: bool | None = _testing(None, "--class_agnostic", read=boolean,
        help="let boxes of different classes suppress each other, too")
    top_k: int | None = _testing(None, "--max_detections", read=positive, metavar="N",
        help="most detections of an image (default: 300 VOC, 200 COCO)")
    per_class: int | None = _testing(None, "--max_per_class", "--per_class", read=positive,
        metavar="N", help="most detections of a class in an image (default: 50)")
    tiles: int | None = _testing(None, "--tiles", read=count, metavar="SIDE",
        help="also detect in square tiles, SIDE pixels wide, for small objects in large images "
             "(default: 0, the whole image alone)")
    overlap: float | None = _testing(None, "--overlap", read=fraction, metavar="X",
        help="share of a tile that the next one shows, too (default: 0.2)")
    flip: bool | None = _testing(None, "--flip", read=boolean,
        help="also detect in mirrored images")
    background_shortcut: bool | None = _testing(None, "--background_shortcut", read=boolean,
        help="drop prior boxes whose background score is 0.9 or more, as the authors' later "
             "release does")
    eval_backend: str | None = option("testing", None, "--eval-backend",
        choices=BACKENDS, help="library that computes COCO's numbers (default: pycocotools)")

    basenet: str = _starting("auto", "--basenet", metavar="FILE|auto|none",
        help="pretrained weights of the base network (auto: the published file if it is in "
             "weights/, else none: new weights)")
    resume: str | None = _starting(None, "--resume", metavar="FILE|auto",
        help="continue a run from its checkpoint (auto: the newest run, or a new one)")
    resume_net: str | None = _starting(None, "--resume_net", metavar="FILE",
        help="start a new run from the weights of a whole detector")
    class_map: str | None = option("where training starts", None, "--class_map", metavar="MAP",
        help="own=other,... or a file with one a line: the class of the checkpoint of --resume_net "
             "or --test that an own class corresponds to (default: the class of equal name, and "
             "VOC's name for COCO's)")
    resume_epoch: int | None = _starting(None, "--resume_epoch", read=count, metavar="N",
        help="with --resume_net: the epoch at which the schedule starts (default: 0)")
    max_iters: int | None = option("recipe", None, "--max_iters", read=positive, metavar="N",
        only="train", help="stop after this many steps in all, e.g. to try things out")

    max_hours: float | None = option("machine", None, "--max_hours", read=number, metavar="X",
        only="train", help="save and end with status 0 after X hours of this call; --resume auto "
             "goes on")

    device: str | None = option("machine", None, "--device", metavar="NAME",
        help="cpu, cuda, cuda:N, mps (Apple's GPU; untried), or auto: the first available of cuda, "
             "mps and cpu (default: auto)")
    cuda: bool | None = option("machine", None, "--cuda", read=boolean,
        help="true: --device cuda; false: --device cpu")
    ngpu: int | None = option("machine", None, "--ngpu", read=positive, metavar="N",
        help="GPUs of this machine that share a batch, a process each (torchrun starts the "
             "processes of several machines: docs/many_gpus.md)")
    date: str | None = option("output", None, "--date", read=folder_name, metavar="NAME",
        help="name of the run (default: the time)")
    # fmt: on

    @property
    def given_detection(self) -> dict[str, object]:
        """The detection options of this call, by the names of ``DetectConfig``."""
        names = (spec.name for spec in dataclasses.fields(DetectConfig))
        values = {name: getattr(self, name, None) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def given_views(self) -> dict[str, object]:
        """The options of this call that are those of ``inference.views.Views``."""
        values = {name: getattr(self, name) for name in ("tiles", "overlap", "flip")}
        return {name: value for name, value in values.items() if value is not None}

    def device_name(self) -> str:
        """Return what --device and --cuda ask for together.

        Raises:
            UserError: they contradict each other.
        """
        name = self.device or "auto"
        if self.cuda is None:
            return name
        wanted = "cuda" if self.cuda else "cpu"
        if name not in ("auto", wanted) and not name.startswith(f"{wanted}:"):
            raise UserError(f"--cuda {self.cuda} contradicts --device {name}; give one of them")
        return wanted if name == "auto" else name


OPTIONS = {spec.name: spec for kind in (Options, Call) for spec in dataclasses.fields(kind)}
OPTIONS = {name: spec for name, spec in OPTIONS.items() if spec.metadata["flags"]}
"""Every option of the command line, by name."""


# ---------------------------------------------------------------- command line

GROUPS = ("what", "testing", "where training starts", "recipe", "machine", "output")
"""Headings of --help, in order."""


def default_text(spec: dataclasses.Field) -> str:
    """Return the default of an option for ``--help`` and the README, or "" if its help has it.

    Data sets and recipes that differ are named.
    """
    if spec.default in (None, "", ()) or "(default: " in spec.metadata["help"]:
        return ""

    def text(value: object) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        return f"{value:g}" if isinstance(value, float) else str(value)

    row_field = {"max_epoch": "epochs", "weight_decay": "weight_decay"}.get(spec.name)
    parts = [text(spec.default)]
    if row_field:
        first: dict[str, str] = {}  # the other rows are trained as one of these
        for name, row in DATASETS.items():
            first.setdefault(text(getattr(row, row_field)), name)
        parts = [f"{value} {name}" for value, name in first.items()]
    words = [", ".join(parts)]
    words += [f"{name}: {text(values[spec.name])}"
              for name, values in RECIPES.items() if spec.name in values]  # fmt: skip
    return "; ".join(words)


def parser() -> Parser:
    """Return the parser of the command line.

    Options that are not given are absent from its result: a checkpoint fills them in, then the
    defaults do.
    """
    p = Parser(
        description="Train an SSD detector (the default), or evaluate one (--test).",
        epilog="Own data: train_test.py --root FOLDER -s 300. --test and "
        "--resume take the network, the size, the data set and the classes from the checkpoint.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups = {name: p.add_argument_group(name) for name in GROUPS}
    for name, spec in OPTIONS.items():
        add_option(groups[spec.metadata["group"]], name)
    return p


def add_option(group: argparse._ActionsContainer, name: str) -> None:
    """Add one of `OPTIONS` to a parser, or to a group of its help."""
    spec = OPTIONS[name]
    meta, default = spec.metadata, default_text(spec)
    keywords = {"dest": name, "help": meta["help"] + (f" (default: {default})" * bool(default))}
    if meta["read"] is boolean:
        keywords |= {"type": boolean, "nargs": "?", "const": True}
    else:
        keywords |= {"type": meta["read"], "choices": meta["choices"], "metavar": meta["metavar"]}
    group.add_argument(*meta["flags"], **keywords)


def parse(argv: Sequence[str]) -> tuple[Call, dict[str, object]]:
    """Return what the command line asks of this call, and the ``Options`` that it gives.

    Raises:
        UserError: an option is given that the kind of call, training or testing, does not have.
        SystemExit: as ``argparse``.
    """
    given = vars(parser().parse_args(argv))
    names = {spec.name for spec in dataclasses.fields(Call)}
    call = Call(**{name: value for name, value in given.items() if name in names})
    refused = "train" if call.test else "test"
    # A switch that is given as off asks for nothing.
    wrong = [flag_of(OPTIONS[name]) for name, value in given.items()
             if OPTIONS[name].metadata["only"] == refused
             and not (value is False and not OPTIONS[name].default)]
    if wrong and call.test:
        raise UserError(f"{', '.join(wrong)}: for training, but --test evaluates; give one of them")
    if wrong:
        raise UserError(f"{', '.join(wrong)}: for testing only; give --test FILE, too")
    return call, {name: value for name, value in given.items() if name not in names}
