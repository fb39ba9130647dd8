"""What lies between a network's outputs and a loss or detections."""

from layers.detect import Detect, DetectConfig
from layers.l2norm import L2Norm
from layers.multibox_loss import MultiBoxLoss
from layers.prior_box import PriorBox

__all__ = ["Detect", "DetectConfig", "L2Norm", "MultiBoxLoss", "PriorBox"]
