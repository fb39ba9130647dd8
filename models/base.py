"""What every base network is: layers in a row that yield two feature maps."""

from __future__ import annotations

from torch import Tensor, nn


class BaseNetwork(nn.Sequential):
    """A classifier's layers: images [B, 3, S, S] -> (stride-8 map, stride-16 map).

    A subclass adds its layers and says ``tap``, the position of the layer that gives the
    stride-8 map, and ``out_channels`` of the two maps.
    """

    tap: int
    out_channels: tuple[int, int]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for i, layer in enumerate(self):
            x = layer(x)
            if i == self.tap:
                stride8 = x
        return stride8, x


def init_kaiming(module: nn.Module) -> None:
    """Kaiming-normal (fan-out) convolutions with zero bias, as HarDNet's classifiers start."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
