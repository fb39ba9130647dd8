"""Compile a share of the gathered convolutions, so that several processes fill Triton's cache.

    python -m benchmarks.gather --share K/N [--device cuda]

Each layer's shape is a program of its own, and several tiles are tried for each, which takes one
process many minutes. The K-th of N processes (0 to N - 1) compiles its share of the layers of
SSD512-HarDNet68 for one of `FEW_TILES`; `benchmarks.speed --few_tiles` then tries these alone.
"""

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Rows, new_net, options, program, run
from inference import gathered_conv
from inference.deploy import deploy
from utils.errors import command

FEW_TILES = ((64, 16), (128, 32), (128, 64))
"""Every number of outputs of a layer fits at least one of them."""


def choose_tiles(tiles: Sequence[tuple[int, int]]) -> None:
    """Let the gathered convolutions try these tiles only, and briefly."""
    import triton
    from triton.testing import do_bench

    gathered_conv.TILES = tiles
    triton.autotune = partial(triton.autotune, do_bench=partial(do_bench, warmup=5, rep=20))


class Share:
    """Runs every ``of``-th different convolution; the others give zeros."""

    def __init__(self, number: int, of: int) -> None:
        self.number, self.of = number, of
        self.seen: dict[tuple, int] = {}
        self.run = gathered_conv.gathered_conv2d

    def __call__(self, parts: Sequence[Tensor], weight: gathered_conv.GatheredWeight,
                 out: None = None) -> Tensor:
        x, outputs = parts[0], len(weight.bias)
        key = (weight.widths, outputs, weight.kernel, weight.activation, x.shape)
        turn = self.seen.setdefault(key, len(self.seen))
        if turn % self.of == self.number:
            return self.run(parts, weight, out)
        zeros = x.new_zeros(len(x), outputs, *x.shape[2:])
        return zeros.to(memory_format=torch.channels_last)


def share(text: str) -> tuple[int, int]:
    number, of = map(int, text.split("/"))
    if not 0 <= number < of:
        raise ValueError(text)
    return number, of


def warm(args: argparse.Namespace, device: torch.device) -> Rows:
    (number, of), tiles = args.share, len(FEW_TILES)
    choose_tiles((FEW_TILES[number % tiles],))
    gathered_conv.gathered_conv2d = some = Share(number // tiles, max(of // tiles, 1))
    net, _ = new_net("SSD_HarDNet68", 512, device)
    with torch.inference_mode():
        deploy(net, gather=True).to(device, torch.bfloat16)(torch.zeros(1, 3, 512, 512).to(device))
    yield {"share": list(args.share), "layers": len(some.seen)}


def parser() -> argparse.ArgumentParser:
    p = program("gather", __doc__, options(warm, 1))
    p.add_argument("--share", required=True, metavar="K/N", type=share)
    return p


main = command(partial(run, parser))

if __name__ == "__main__":
    raise SystemExit(main())
