"""The layers between a network's outputs and a loss or detections."""

from layers.detect import Detect
from layers.l2norm import L2Norm
from layers.multibox_loss import MultiBoxLoss
from layers.prior_box import PriorBox

__all__ = ["Detect", "L2Norm", "MultiBoxLoss", "PriorBox"]
