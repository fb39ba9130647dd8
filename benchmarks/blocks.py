"""HarD blocks by the routes of ``inference.deploy``, as ratios to concatenation in the same run.

    python -m benchmarks.blocks [--device cuda] [--version SSD_HarDNet68] [--size 512]
                                [--batch 1 32] [--amp bf16] [--routes ROUTE ...] [--pad 1 8 16]
                                [--compile] [--eager] [--json OUT]

A block is timed with the 1x1 convolution behind it, from that block's input in memory, its weights
and maps in the type of ``--amp``. Routes take turns within every round; times are medians. On a GPU
they are those of captured graphs, so that launching them does not count; with ``--eager``, of the
calls. Every route's output is compared with the plain one's in float32. The bytes are those of the
whole network and one picture: convolutions' inputs and outputs, copies and sums (docs/traffic.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.timing import machine, medians, write
from inference.deploy import BLOCKS, HarmonicBlock, deploy
from models import BACKBONES, build_net
from models.hardnet import HarDBlock
from tools.traffic import profile, table
from utils.device import AMP_TYPES

PLAIN = "concatenate"
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Of a block's output, relative in the norm; float32's is TF32's on a GPU."""


def block_inputs(net: nn.Module, size: int) -> list[tuple[int, int, int]]:
    """Channels, height and width of what every HarD block of ``net`` takes."""
    shapes = []

    def note(module: nn.Module, inputs: tuple[Tensor]) -> None:
        shapes.append(tuple(inputs[0].shape[1:]))

    hooks = [m.register_forward_pre_hook(note) for m in net.modules() if isinstance(m, HarDBlock)]
    with torch.inference_mode():
        net.sources(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return shapes


def graph_of(call: Callable[[], Tensor]) -> Callable[[], None]:
    """A replay of what ``call`` launches; it has run before, so that algorithms are chosen."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(
    ways: dict[str, nn.Module],
    shapes: list[tuple[int, int, int]],
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    compiled: bool,
    eager: bool,
) -> dict[str, list[float]]:
    """Median seconds of every way for each of the blocks.

    Raises:
        AssertionError: a block's output is not that of the plain way.
    """
    blocks = {
        way: [m for m in net.modules() if isinstance(m, HarmonicBlock)] for way, net in ways.items()
    }
    seconds: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(0)
    for i, shape in enumerate(shapes):
        x = torch.rand(batch, *shape, generator=generator).to(device, dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        modules = {way: found[i].to(device, dtype) for way, found in blocks.items()}
        if compiled:
            torch.compiler.reset()  # a limit of compilations holds for all blocks together
            modules |= {f"{PLAIN}, compiled": torch.compile(modules[PLAIN], dynamic=False)}
        expected = blocks[PLAIN][i].float()(x.float())
        blocks[PLAIN][i].to(dtype)
        calls = {}
        for way, module in modules.items():
            error = float((module(x).float() - expected).norm() / expected.norm())
            assert error < TOLERANCE[dtype], f"{way}, block {i}: another output, by {error:.1e}"
            call = partial(module, x)
            calls[way] = call if eager or device.type != "cuda" else graph_of(call)
        for way, median in medians(calls, rounds, device).items():
            seconds.setdefault(way, []).append(median)
    return seconds


def main(argv: list[str] | None = None) -> int:
    hardnets = [version for version in BACKBONES if "HarDNet" in version]
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--version", choices=hardnets, default="SSD_HarDNet68")
    p.add_argument("--size", type=int, default=512)
    p.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    p.add_argument("--amp", choices=AMP_TYPES, nargs="+", default=["off", "bf16"])
    p.add_argument(
        "--routes", choices=BLOCKS, nargs="+", default=list(BLOCKS),
        help="beside concatenate (all; gather is left out on a CPU)",
    )  # fmt: skip
    p.add_argument("--pad", type=int, nargs="+", default=[1, 8, 16], help="multiples of widths")
    p.add_argument("--compile", action="store_true", help="concatenate by torch.compile, too")
    p.add_argument("--eager", action="store_true", help="on a GPU, time calls and not graphs")
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument("--json", type=Path)
    args = p.parse_args(argv)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions by default
    net = build_net(args.version, args.size, 81).eval()
    shapes = block_inputs(net, args.size)
    wanted = [(PLAIN, 1)]
    for route, pad in product(args.routes, args.pad):
        if (route, pad) != (PLAIN, 1) and (route != "gather" or device.type == "cuda"):
            wanted.append((route, pad))
    print(machine(device))
    rows = []
    for amp in args.amp:
        dtype = AMP_TYPES[amp] or torch.float32
        ways = {
            route if pad == 1 else f"{route}, pad {pad}": deploy(net, route, pad)
            for route, pad in wanted
        }
        moved = {}
        for way, deployed in ways.items():
            counted = profile(deployed, args.size)
            moved[way] = (counted.traffic + counted.sums) * dtype.itemsize
        for batch in args.batch:
            with torch.inference_mode():
                seconds = measure(
                    ways, shapes, batch, device, dtype, args.rounds, args.compile, args.eager
                )
            plain = sum(seconds[PLAIN])
            lines = []
            for way, times in seconds.items():
                size = f"{moved[way] / 1e6:.0f}" if way in moved else "-"
                milliseconds = [f"{t * 1e3:.3f}" for t in (*times, sum(times))]
                lines.append((way, *milliseconds, f"{plain / sum(times):.2f}", size))
                rows.append(
                    {"amp": amp, "batch": batch, "way": way, "seconds": times}
                    | {"bytes": moved.get(way), "ratio": plain / sum(times)}
                )
            print(
                f"\n{args.version} at {args.size}, batch {batch}, {amp}; milliseconds of blocks\n"
            )
            header = ["x".join(map(str, shape)) for shape in shapes]
            print(table(("route", *header, "all", "times faster", "MB"), lines), flush=True)
    write(
        args.json,
        device,
        version=args.version,
        size=args.size,
        blocks=shapes,
        graphs=device.type == "cuda" and not args.eager,
        rows=rows,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
