"""Parameters, MACs and memory traffic, against hand counts and PyTorch's FLOP counter."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import commands
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from models import BACKBONES, build_net
from tools.traffic import Profile, main, profile, summary_table, table

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "traffic.md").read_text("utf-8")
COMMANDS = commands("docs/traffic.md")
TABLE = "".join(line + "\n" for line in PAGE.splitlines() if line.startswith("|"))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


ROWS = {tuple(row[:2]): row for row in map(cells, TABLE.splitlines()[2:])}


def built(version: str, size: int, num_classes: int = 81) -> nn.Module:
    with torch.device("meta"):
        return build_net(version, size, num_classes)


@pytest.mark.parametrize(("version", "size"),
                         [(v, s) for v, row in BACKBONES.items() for s in row.sizes])
def test_totals_agree_with_other_ways_to_count(version, size, monkeypatch):
    """FLOPs by PyTorch's counter, CIO by hooks on modules, concatenations by their caller."""
    net = built(version, size).eval()
    result = profile(net, size)

    cio, concat, cat = [], [], torch.cat

    def count_cat(tensors, dim=0):
        output = cat(tensors, dim)
        if len(tensors) > 1:
            concat.append(2 * output.numel())  # what is written has been read
        return output

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, x, y: cio.append(x[0].numel() + y.numel()))
    monkeypatch.setattr(torch, "cat", count_cat)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        net(torch.empty(1, 3, size, size, device="meta"))
    assert 2 * result.macs == flops.get_total_flops()
    assert (result.cio, result.concat) == (sum(cio), sum(concat))
    assert result.parameters == sum(p.numel() for p in net.parameters())
    assert result.parameters == sum(layer.parameters for layer in result.layers)
    # The page pins every figure. After a change, paste the output of `python -m tools.traffic`.
    printed = cells(summary_table([(version, size, result)]).splitlines()[2])
    assert printed == ROWS[version, str(size)]


def test_first_layers_of_hardnet68_by_hand():
    layers = profile(built("SSD_HarDNet68", 512), 512).layers
    first, norm = layers[:2]
    assert (first.name, first.kind) == ("base.0.conv", "conv 3x3 /2")
    assert (first.inputs, first.output) == (((1, 3, 512, 512),), (1, 32, 256, 256))
    assert (first.parameters, first.macs) == (3 * 32 * 9, 3 * 32 * 9 * 256**2)
    assert (first.cio, first.concat) == (3 * 512**2 + 32 * 256**2, 0)
    assert (norm.name, norm.kind, norm.parameters) == ("base.0.norm", "BatchNorm2d", 64)
    assert norm.macs == norm.cio == norm.concat == 0

    # The first block: 8 layers of k = 14, m = 1.7 on 64 channels of 128 x 128. Layers 2, 4, 6, 8
    # join their inputs, and the output joins layers 1, 3, 5, 7 and 8.
    block = [layer for layer in layers if layer.name.startswith("base.3")]
    joined = [14 + 64, 14 + 24 + 64, 14 + 40, 14 + 24 + 40 + 64, 4 * 14 + 68]
    assert [layer.concat for layer in block if layer.concat] == [2 * n * 128**2 for n in joined]
    assert {layer.name for layer in block if layer.kind == "concat"} == {"base.3"}
    widths = [(64, 14), (78, 24), (24, 14), (102, 40), (40, 14), (54, 24), (24, 14), (142, 68)]
    convolutions = [layer for layer in block if layer.cio]
    assert [layer.cio for layer in convolutions] == [(i + o) * 128**2 for i, o in widths]
    assert [layer.macs for layer in convolutions] == [9 * i * o * 128**2 for i, o in widths]
    (bridge,) = [layer for layer in layers if "dilation" in layer.kind]
    assert (bridge.name, bridge.kind) == ("base.13.1", "conv 3x3 dilation 4")


def test_vgg16_and_heads_by_hand():
    layers = profile(built("SSD_vgg", 512), 512).layers
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    sides = [512] * 2 + [256] * 2 + [128] * 3 + [64] * 3 + [32] * 3
    expected = [9 * i * o * s**2 for i, o, s in zip(widths, widths[1:], sides, strict=False)]
    base = [layer.macs for layer in layers if layer.name.startswith("base")]
    assert base == [*expected, 9 * 512 * 1024 * 32**2, 1024 * 1024 * 32**2]
    # 32,756 prior boxes of 4 numbers and of 81; no other concatenation.
    joined = [(layer.name, layer.concat) for layer in layers if layer.concat]
    assert joined == [("", 2 * 32_756 * 4), ("", 2 * 32_756 * 81)]


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, bias=False)
        self.scale = nn.Parameter(torch.ones(2, 3, 1, 1))
        self.register_buffer("shift", torch.zeros(1), persistent=False)
        self.drop = nn.Dropout()

    def forward(self, x):
        x = torch.cat([torch.cat([x], 1), F.conv2d(x, self.scale) + self.shift], 1)
        x = torch.cat([x, x[:, :1]], 1)
        return self.up(self.drop(self.depthwise(x)))


def test_functions_groups_and_transposed_convolutions_count():
    net = Toy().train()
    layers = profile(net, 10).layers
    assert [(x.name, x.kind, x.parameters, x.macs, x.cio, x.concat) for x in layers] == [
        ("", "conv 1x1", 6, 6 * 100, 5 * 100, 0),
        ("", "concat", 0, 0, 0, 2 * 5 * 100),  # the one of a single tensor copies nothing new
        ("", "concat", 0, 0, 0, 2 * 6 * 100),
        ("depthwise", "conv 3x3 groups 6", 6 * 9 + 6, 6 * 9 * 100, 12 * 100, 0),
        ("up", "transposed conv 2x2 /2", 6 * 4 * 4, 6 * 4 * 4 * 100, 6 * 100 + 4 * 400, 0),
    ]
    assert [x.inputs for x in layers][1] == ((1, 3, 10, 10), (1, 2, 10, 10))
    with FlopCounterMode(display=False) as flops:
        net(torch.zeros(1, 3, 10, 10))
    assert 2 * sum(x.macs for x in layers) == flops.get_total_flops()


def test_the_network_stays_as_it_was():
    net = Toy().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    profile(net, 10)
    assert net.training and net.up.weight.device.type == "cpu"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_table_aligns_words_left_and_numbers_right():
    assert table(("name", "n"), [("a", 1), ("bcdef", 1234)]) == (
        "| name  |     n |\n|-------|------:|\n| a     |     1 |\n| bcdef | 1,234 |"
    )


def test_layers_are_printed_with_shapes(capsys):
    assert main(["-v", "SSD_HarDNet68", "-s", "300", "--num_classes", "21", "--layers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "SSD_HarDNet68 at 300"
    cells = [re.split(r" *\| *", line)[1:-1] for line in lines if line.startswith("| ")]
    assert cells[0][:4] == ["layer", "kind", "input", "output"]
    concat = ["base.3", "concat", "14+24+64x75x75", "102x75x75"]
    assert [*concat, "0", "0", "0", "1,147,500"] in cells
    heads = ["concat", "8664+2166+600+150+36+4", "11620"]
    assert ["", heads[0], f"{heads[1]}x21", f"{heads[2]}x21", "0", "0", "0", "488,040"] in cells
    assert cells[-1][:3] == ["SSD_HarDNet68", "300", "17,260,864"]


@pytest.mark.parametrize(("arguments", "words"), [
    (["-s", "400"], "does not exist at size 400, choose from 300, 512"),
    (["-v", "SSD_mobile", "-s", "512"], "error: SSD_mobile does not exist at size 512"),
    (["-v", "SSD_vgg", "--num_classes", "1"], "error: num_classes is 1"),
    (["-v", "SSD_vgg", "--json", "."], "error: .: cannot be written")])
def test_wrong_arguments_give_one_sentence(arguments, words, capsys):
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == "" and words in output.err and output.err.count("\n") == 1


@pytest.mark.parametrize("sizes", [[], [512]])
def test_all_networks_are_those_that_have_the_size(sizes, monkeypatch, capsys):
    monkeypatch.setattr("tools.traffic.build_net", lambda *_: None)
    monkeypatch.setattr("tools.traffic.profile", lambda net, size: Profile((), 0, 0))
    assert main(["-s", *map(str, sizes)] if sizes else []) == 0
    lines = [cells(line)[:2] for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines == [list(key) for key in ROWS if not sizes or key[1] == "512"]


def test_commands_of_the_page_run_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert COMMANDS[0] == ["python", "-m", "tools.traffic"]
    for command in COMMANDS[1:]:
        assert command[:3] == ["python", "-m", "tools.traffic"]
        assert main(command[3:]) == 0
    assert capsys.readouterr().out.count("SSD_HarDNet68 at 512") == 1
    (report,) = json.loads((tmp_path / "OUT.json").read_text())
    assert (report["version"], report["size"], report["num_classes"]) == ("SSD_HarDNet68", 512, 21)
    assert report["traffic_bytes"] == {"fp32": 4 * report["traffic"], "bf16": 2 * report["traffic"]}
    parameters = report["parameters"]
    assert report["parameter_bytes"] == {"fp32": 4 * parameters, "bf16": 2 * parameters}
    for total in ("parameters", "macs", "cio", "concat"):
        assert report[total] == sum(layer[total] for layer in report["layers"])
    assert report["traffic"] == report["cio"] + report["concat"]


def test_page_draws_its_conclusions_from_the_table():
    rows = {key: [int(cell.replace(",", "")) for cell in row[2:]] for key, row in ROWS.items()}
    small, large, vgg = (rows[v, "512"] for v in ("SSD_HarDNet68", "SSD_HarDNet85", "SSD_vgg"))
    shares = [small[2] / vgg[2], small[1] / vgg[1], small[4] / vgg[4], large[4] / vgg[4]]
    told = PAGE.partition("## What it tells")[2]
    assert re.findall(r"(\d+) %", told) == [f"{100 * share:.0f}" for share in shares]
