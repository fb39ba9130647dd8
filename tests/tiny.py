"""A network small enough to train in a test: the real SSD parts on a base of two convolutions."""

from torch import nn

from models import BACKBONES, Backbone
from models.hardnet import HarDNetBase, HarDNetSpec


class TinyBase(nn.ModuleList):
    """Images [B, 3, 300, 300] -> maps of 38 and 19 cells."""

    out_channels = (8, 16)
    norm = nn.BatchNorm2d

    def __init__(self) -> None:
        super().__init__([nn.Conv2d(3, 8, 3, 8, 1), self.norm(8), nn.Conv2d(8, 16, 3, 2, 1)])

    def forward(self, x):
        stride8 = self[1](self[0](x)).relu()
        return stride8, self[2](stride8).relu()


class PlainBase(TinyBase):
    """The same without batch normalisation: images of a batch do not influence each other."""

    norm = nn.Identity


class SmallHarDNet(HarDNetBase):
    """Three small HarD blocks with depthwise convolutions."""

    def __init__(self) -> None:
        super().__init__(HarDNetSpec(
            stem=(8, 12), growth=(8, 6, 8), layers=(2, 2, 4), channels=(16, 32, 24), multiplier=1.7,
            pool_after={0: False, 1: False}, stride8_block=1, dilated_bridge=False, depthwise=True,
        ))


TINY = Backbone(TinyBase)
PLAIN = Backbone(PlainBase)


def register() -> None:
    """For a process of its own; a test in this process sets the entry with monkeypatch."""
    BACKBONES["tiny"] = TINY
    BACKBONES["plain"] = PLAIN
