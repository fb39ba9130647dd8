"""What stands before and behind the network in an exported graph: preprocessing, detection."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layers.detect import DetectConfig


class Preprocess(nn.Module):
    """Map uint8 [B, H, W, 3] BGR images to float32 [B, 3, S, S], minus the mean.

    Args of the constructor:
        size: S.
        mean: subtracted from the pixels, BGR.
        resize: resize the images, bilinearly; else they are S x S. It computes what
            ``cv2.INTER_LINEAR`` computes in fixed-point arithmetic, to the last bit. A runtime that
            divides by multiplying, such as OpenVINO, gets one value of a thousand wrong by 1.
    """

    def __init__(self, size: int, mean: Sequence[float], resize: bool) -> None:
        super().__init__()
        self.size = size
        self.resize = resize
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("places", 2 * torch.arange(size) + 1, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.resize:
            before, after, share = self._taps(images.shape[2], clamp=True)
            share = share[:, None]
            left, right = (images.index_select(2, taps).float() for taps in (before, after))
            rows = ((left * (2048 - share) + right * share) / 16).floor()
            before, after, share = self._taps(images.shape[1], clamp=False)
            share = share[:, None, None]
            above, below = (rows.index_select(1, taps) for taps in (before, after))
            images = _product(above, 2048 - share) + _product(below, share)
            images = ((images + 2) / 4).floor()
        return (images.float() - self.mean).permute(0, 3, 1, 2)

    def _taps(self, length: int, clamp: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the two source pixels of each of the S places on a side of ``length`` pixels.

        Also return the weight of the second pixel, in 1/2048. Beyond the ends OpenCV gives one
        pixel the full weight (``clamp``), or splits it over the same pixel twice, which rounds
        differently.
        """
        place = (self.places * length - self.size).float() / (2 * self.size)
        first = place.floor()
        weight = place - first
        if clamp:
            weight = torch.where((first < 0) | (first >= length - 1), 0.0, weight)
        first = first.long()
        after = (first + 1).clamp(max=length - 1)
        return first.clamp(min=0), after, (weight * 2048).round()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """floor(a b / 2^16) of integers a < 2^15 and b <= 2^11, whose product overflows float32."""
    high = (a / 128).floor()
    low = ((a - high * 128) * b / 128).floor()
    return ((high * b + low) / 512).floor()


def detect_onnx(priors: Tensor, num_classes: int, variance: Sequence[float], config: DetectConfig,
                *, opset: int, ir_version: int) -> Any:
    """Return ``Detect`` with hard NMS per class as an ``onnx.ModelProto``.

    Inputs of the model: "loc" float32 [B, P, 4], "conf" float32 [B, P, C] and "sizes" float32
    [B, 2], (width, height) in pixels. Outputs: "boxes" float32 [n, 4], corners in pixels, "scores"
    float32 [n], "labels" int64 [n] in 1..C-1 and "image" int64 [n], the index in the batch,
    ascending; within an image the best score first; n may be 0. Unlike ``Detect`` it does not
    notice NaN or infinity.

    Ties: lower class first, then earlier prior, as in ``Detect``. This needs a runtime whose TopK
    is stable: ONNX Runtime's is, OpenVINO's is not.

    Args:
        priors: [P, 4], centre-size, relative.
        num_classes: C, including background.
        config: its first four fields count.
        opset: at least 18, as PyTorch's exporter writes.
    """
    from onnx import numpy_helper, parser

    p = priors.numpy().astype(np.float32)[None]
    floats = {"prior_centre": p[..., :2], "centre_scale": p[..., 2:] * np.float32(variance[0]),
              "prior_half": p[..., 2:] / 2, "size_scale": variance[1], "most_growth": 10,
              "pixel": [0, 0, 1, 1], "score_threshold": [config.conf_thresh],
              "nms_threshold": [config.nms_thresh]}
    integers = {"per_class": [config.per_class], "top_k": config.top_k, "end": [num_classes],
                "zero": 0, "one": 1, "axis_0": [0], "axis_1": [1]}
    model = parser.parse_model(
        _DETECT % {"opset": opset, "ir": ir_version, "P": p.shape[1], "C": num_classes}
    )
    for constants, dtype in ((floats, np.float32), (integers, np.int64)):
        model.graph.initializer.extend(
            numpy_helper.from_array(np.array(value, dtype, order="C"), name)
            for name, value in constants.items()
        )
    return model


_DETECT = """
<ir_version: %(ir)d, opset_import: ["": %(opset)d]>
detect (float[batch, %(P)d, 4] loc, float[batch, %(P)d, %(C)d] conf, float[batch, 2] sizes)
  => (float[found, 4] boxes, float[found] scores, int64[found] labels, int64[found] image)
{
  probability = Softmax <axis = 2> (conf)
  by_class = Transpose <perm = [0, 2, 1]> (probability)
  score = Slice (by_class, axis_1, end, axis_1)

  centre_offset, size_offset = Split <axis = 2, num_outputs = 2> (loc)
  shift = Mul (centre_offset, centre_scale)
  centre = Add (prior_centre, shift)
  logarithm = Mul (size_offset, size_scale)
  limited = Min (logarithm, most_growth)
  growth = Exp (limited)
  half = Mul (prior_half, growth)
  low = Sub (centre, half)
  high = Add (centre, half)
  corners = Concat <axis = 2> (low, high)
  twice = Concat <axis = 1> (sizes, sizes)
  scale = Unsqueeze (twice, axis_1)
  box = Mul (corners, scale)

  wide = Add (box, pixel)
  selected = NonMaxSuppression (wide, score, per_class, nms_threshold, score_threshold)
  of_image, of_class, of_prior = Split <axis = 1, num_outputs = 3> (selected)
  place = Concat <axis = 1> (of_image, of_prior)
  selected_box = GatherND (box, place)
  selected_score = GatherND (score, selected)
  selected_image = Squeeze (of_image, axis_1)
  selected_class = Squeeze (of_class, axis_1)
  selected_label = Add (selected_class, one)

  shape = Shape (selected_score)
  count = Squeeze (shape, axis_0)
  position = Range (zero, count, one)
  best_score, by_score = TopK <axis = 0> (selected_score, shape)
  its_image = Gather (selected_image, by_score)
  first_key = Mul (its_image, count)
  key = Add (first_key, position)
  best_key, by_key = TopK <axis = 0, largest = 0> (key, shape)
  order = Gather (by_score, by_key)
  sorted_image = Gather (selected_image, order)

  batch = Shape <start = 0, end = 1> (sizes)
  batch_size = Squeeze (batch, axis_0)
  each = Range (zero, batch_size, one)
  column = Unsqueeze (sorted_image, axis_1)
  same = Equal (column, each)
  member = Cast <to = 7> (same)
  members = ReduceSum <keepdims = 0> (member, axis_0)
  start = CumSum <exclusive = 1> (members, zero)
  own_start = Gather (start, sorted_image)
  rank = Sub (position, own_start)
  within = Less (rank, top_k)
  kept = Compress <axis = 0> (order, within)
  boxes = Gather (selected_box, kept)
  scores = Gather (selected_score, kept)
  labels = Gather (selected_label, kept)
  image = Gather (selected_image, kept)
}
"""
