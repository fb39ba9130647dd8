"""Exported files of the tiny network for tests."""

from pathlib import Path

import torch
from torch import nn

from engine.options import Options
from models import build_net
from tools.export import main
from utils.checkpoint import save_checkpoint

CLASSES = ["cell", "platelet", "rod"]


def spread_scores(net: nn.Module) -> nn.Module:
    """Make a network of random weights find some boxes with its first heads, of any score."""
    images = torch.rand(1, 3, 300, 300, generator=torch.Generator().manual_seed(0)) * 60 - 110
    with torch.no_grad():
        (first, *_) = net.eval().sources(images)
        for heads, spread in ((net.loc, 0.5), (net.conf, 2)):
            heads[0].weight *= spread / heads[0](first).std()
        for head in net.conf:
            head.bias.view(-1, net.num_classes)[:, 0] = 8
    return net


def write_checkpoint(path: Path, root: Path, version: str = "tiny") -> Path:
    """A checkpoint of random weights that names ``root`` as its data."""
    torch.manual_seed(1)
    net = spread_scores(build_net(version, 300, len(CLASSES) + 1))
    given = {"version": version, "size": 300, "root": str(root), "classes": CLASSES}
    config = Options.of({"config": given, "classes": CLASSES}, path).plain()
    save_checkpoint(path, {"model": net.state_dict(), "config": config, "classes": CLASSES})
    return path


def exported(checkpoint: Path, form: str, *options: object) -> Path:
    """What the command writes beside the checkpoint."""
    suffix = {"onnx": ".onnx", "openvino": ".xml"}[form]
    name = "".join([form, *(word for word in map(str, options) if word.startswith("--"))])
    output = checkpoint.with_name(name + suffix)
    arguments = [checkpoint, "--format", form, "--output", output, *options]
    assert main(list(map(str, arguments))) == 0
    return output
