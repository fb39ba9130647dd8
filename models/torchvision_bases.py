"""Base networks made of torchvision's classifiers, with its names of weights.

torchvision is imported when such a network is built.
"""

from collections import OrderedDict
from importlib import import_module, metadata
from types import ModuleType

import torch
from torch import Tensor, nn

from models.base import BaseNetwork
from utils.errors import UserError


class ResNet101Base(BaseNetwork):
    """ResNet101 (arXiv 1512.03385) up to conv5_x, with dilation instead of conv5_x's stride.

    Source 1 is the output of conv3_x (stride 8, 512 channels), source 2 that of conv5_x (stride 16,
    2048 channels). Keys are those of torchvision's classifier.
    """

    tap = 5
    out_channels = (512, 2048)

    def __init__(self) -> None:
        resnet = _torchvision_models("ResNet101").resnet101(
            weights=None, replace_stride_with_dilation=(False, False, True)
        )
        *layers, _, _ = resnet.named_children()  # without pool and classifier
        super().__init__(OrderedDict(layers))


class MobileNetV2Base(nn.Sequential):
    """MobileNetV2 (arXiv 1801.04381): images [B, 3, S, S] -> (stride-16 map, stride-32 map).

    Source 1 is the expansion in block 14 (576 channels), before the depthwise convolution that
    halves the map, as in section 6.2 of the paper. Source 2 is the output of the last layer (1280
    channels). Keys are those of torchvision's ``features``.
    """

    out_channels = (576, 1280)

    def __init__(self) -> None:
        mobilenet = _torchvision_models("MobileNetV2").mobilenet_v2(weights=None)
        super().__init__(*mobilenet.features)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for i, block in enumerate(self):
            if i == 14:  # a block without a residual connection
                x = stride16 = block.conv[0](x)
                x = block.conv[1:](x)
            else:
                x = block(x)
        return stride16, x


def _torchvision_models(network: str) -> ModuleType:
    try:
        return import_module("torchvision.models")
    # A torchvision compiled for another PyTorch raises one of these.
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        try:
            installed = f"torchvision {metadata.version('torchvision')}"
        except metadata.PackageNotFoundError:
            installed = "torchvision"
        release = torch.__version__.partition("+")[0]
        raise UserError(f"{network} needs torchvision, but {installed} cannot be imported beside "
                        f"torch {torch.__version__} ({error}); install the one that fits: pip "
                        f"install torch=={release} torchvision") from error
