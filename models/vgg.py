"""VGG16 base network (configuration D, arXiv 1409.1556) as SSD reduces it (arXiv 1512.02325)."""

from torch import nn

from models.base import BaseNetwork, init_kaiming

# Widths of convolutions, and pools. "ceil" is pool3, which SSD rounds up: 75 cells become 38.
_LAYERS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "ceil", 512, 512, 512, "pool", 512, 512,
           512)


class VGGBase(BaseNetwork):
    """VGG16 up to fc7, with fc6 and fc7 as convolutions.

    Source 1 is the ReLU of conv4_3 (``tap``), source 2 the ReLU of fc7. List positions are those
    of the published ``vgg16_reducedfc.pth``.
    """

    tap = 22
    out_channels = (512, 1024)

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        for layer in _LAYERS:
            if isinstance(layer, str):
                self.append(nn.MaxPool2d(2, ceil_mode=layer == "ceil"))
            else:
                self.append(nn.Conv2d(channels, layer, 3, padding=1))
                self.append(nn.ReLU(inplace=True))
                channels = layer
        self.append(nn.MaxPool2d(3, stride=1, padding=1))
        for out, kernel, dilation in ((1024, 3, 6), (1024, 1, 1)):
            padding = dilation * (kernel // 2)
            self.append(nn.Conv2d(channels, out, kernel, padding=padding, dilation=dilation))
            self.append(nn.ReLU(inplace=True))
            channels = out
        # Without batch normalisation, PyTorch's default weights make activations vanish.
        init_kaiming(self)
