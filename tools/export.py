"""Export a detector to ONNX or OpenVINO, proven against the PyTorch network it is made of.

    python -m tools.export CHECKPOINT --format onnx|openvino [--preprocess] [--with-nms]
        [--dynamic] [--precision fp32|bf16|fp16|int8] [--images FOLDER] [--output FILE]

Exit status: 0 done, 1 the file differs too much, or unexpected failure, 2 bad usage or bad input,
130 interrupted. docs/exporting.md explains the options and the proof.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from data.classes import parse_classes
from data.image import limit_pixels
from engine.options import add_option
from inference.export import IMAGES, ExportOptions, export
from inference.formats import FORMATS, PRECISIONS
from inference.proof import TOLERANCE, TooDifferent
from utils.arguments import Parser, count, fraction, number, positive
from utils.errors import command


def parse(argv: Sequence[str] | None) -> ExportOptions:
    p = Parser(prog="python -m tools.export", description=__doc__.splitlines()[0],
               allow_abbrev=False)
    p.add_argument("checkpoint", metavar="CHECKPOINT", type=Path,
                   help="checkpoint of a training, or a published file")
    p.add_argument("--format", required=True, choices=FORMATS, help="kind of file")
    p.add_argument("--precision", default="fp32", choices=PRECISIONS,
                   help="precision of the network (default: fp32)")
    p.add_argument("--output", metavar="FILE", type=Path,
                   help="file to write (default: beside the checkpoint)")
    p.add_argument("--preprocess", action="store_true",
                   help="the graph takes uint8 BGR images; with --dynamic of any size")
    p.add_argument("--with-nms", action="store_true",
                   help="the graph gives detections in pixels instead of the network's outputs")
    p.add_argument("--dynamic", action="store_true", help="the graph takes any number of images")
    p.add_argument("--classes", metavar="NAMES",
                   help="a,b,c or a file with a name a line, for a checkpoint without names")
    p.add_argument("--score_threshold", type=fraction, metavar="X",
                   help="lowest score of a detection (default: 0.03 VOC, 0.02 COCO)")
    p.add_argument("--max_detections", type=positive, metavar="N",
                   help="most detections of an image (default: 300 VOC, 200 COCO)")
    g = p.add_argument_group("proof")
    g.add_argument("--images", "--pictures", metavar="FOLDER",
                   help="images or a data set (default: what the checkpoint was tested on)")
    g.add_argument("--sets", metavar="SETS", help="image sets of the data set, e.g. 2007_test")
    g.add_argument("--limit", type=count, default=IMAGES, metavar="N",
                   help=f"most images, 0: all (default: {IMAGES})")
    losses = ", ".join(f"{t.ap:g} {name}" for name, t in TOLERANCE.items())
    g.add_argument("--tolerance", type=number, metavar="X",
                   help=f"largest loss of AP, in points (default: {losses})")
    g = p.add_argument_group("INT8")
    g.add_argument("--calibrate", metavar="FOLDER",
                   help="images or a data set (default: what the checkpoint was trained on)")
    g.add_argument("--calibrate_sets", metavar="SETS",
                   help="image sets of the data set, e.g. 2007_trainval")
    add_option(p, "max_pixels")
    given = vars(p.parse_args(argv))
    limit_pixels(given.pop("max_pixels"))
    classes = parse_classes(given["classes"]) if given["classes"] else None
    return ExportOptions(**{**given, "classes": classes})


@command
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        lines = export(options)
    except TooDifferent as error:
        if error.proof is not None:
            print("\n".join(error.proof.lines()))
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
