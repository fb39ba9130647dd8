"""The augmentation of SSD (arXiv 1512.02325, section 2.2; the variant of Chainer-SSD and RFBNet).

Every random function draws only from the `numpy.random.Generator` that it is given. Images stay
uint8 BGR [H, W, 3]; the mean is subtracted later, on the device. A target is float32 [n, 5] of
x1, y1, x2, y2 in pixels, inside the image and with an area, and a label; n may be 0. No function
changes its arguments, but a returned array may be a view of one.
"""

from dataclasses import dataclass

import cv2
import numpy as np

CROP_MIN_IOUS = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)  # None: no crop; 0: no limit
CROP_TRIES = 50
INTERPOLATIONS = (
    cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA, cv2.INTER_NEAREST, cv2.INTER_LANCZOS4,
)


@dataclass
class SSDAugmentation:
    """Random crop, photometric distortion, mirror, expansion and resize of one training sample.

    Boxes narrower or lower than 1 % of the result are dropped. If none is left, the result is the
    original image, resized, with all its boxes, however small. An image without boxes is
    distorted, mirrored and expanded, but never cropped.

    size: side of the square result. mean: BGR colour around an expanded image. expansion: the
    probability of an expansion.
    """

    size: int
    mean: tuple[float, float, float] = (104, 117, 123)
    expansion: float = 0.6

    def __call__(self, image: np.ndarray, target: np.ndarray,
                 rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return uint8 [size, size, 3] and float32 [m, 5], corners in 0..1 and the label."""
        result, boxes = random_crop(image, target, rng)
        result = photometric_distort(result, rng)
        # The published order is expand, mirror. The place on the canvas is uniform, and so is its
        # mirror image: this order gives the same distribution and moves fewer pixels.
        if rng.random() < 0.5:
            result, boxes = mirror(result, boxes)
        canvas = expand(result.shape[1], result.shape[0], rng, self.expansion)
        interpolation = INTERPOLATIONS[rng.integers(len(INTERPOLATIONS))]

        large = (100 * (boxes[:, 2:4] - boxes[:, :2]) >= canvas[:2]).all(1)
        if large.any() or not len(target):
            boxes = boxes[large]
        else:
            result, boxes, canvas = image, target, (image.shape[1], image.shape[0], 0, 0)
        return resize(result, boxes, canvas, self.size, interpolation, self.mean)


@dataclass
class ResizeOnly:
    """`SSDAugmentation` without randomness: the image as evaluation sees it, and all boxes."""

    size: int

    def __call__(self, image: np.ndarray, target: np.ndarray,
                 rng: np.random.Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return uint8 [size, size, 3] and float32 [n, 5], corners in 0..1 and the label."""
        canvas = (image.shape[1], image.shape[0], 0, 0)
        return resize(image, target, canvas, self.size, cv2.INTER_LINEAR, (0, 0, 0))


def to_square(image: np.ndarray, size: int) -> np.ndarray:
    """Return the image as evaluation sees it: uint8 [size, size, 3], bilinear, aspect not kept."""
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)


def random_crop(image: np.ndarray, target: np.ndarray,
                rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Crop so that every box keeps a minimum IoU, drawn at random, with the crop.

    Returns a view of the image, and the boxes whose centre lies inside it (at least one), clipped
    and relative to its corner. An image without boxes stays whole.
    """
    if not len(target):
        return image, target
    extent = np.array((image.shape[1], image.shape[0]))
    low, high = target[:, :2], target[:, 2:4]
    centres, areas = (low + high) / 2, (high - low).prod(1)
    while True:  # a minimum IoU without a valid crop is drawn again; "no crop" always ends
        min_iou = CROP_MIN_IOUS[rng.integers(len(CROP_MIN_IOUS))]
        if min_iou is None:
            return image, target
        # An IoU is at most the smaller area / the larger. With the limit m, a valid crop is at most
        # the smallest box / m and at least the largest * m; here it cannot be both.
        if areas.max() * min_iou**2 > areas.min():
            continue
        # All tries are drawn at once; the first valid one counts, as if drawn one by one.
        scale = rng.uniform(0.3, 1, (CROP_TRIES, 1))
        aspect = np.sqrt(rng.uniform(np.maximum(0.5, scale**2), np.minimum(2, scale**-2)))
        sides = np.maximum(np.hstack((scale * aspect, scale / aspect)) * extent, 1).astype(int)
        starts = rng.integers(extent - sides, endpoint=True)
        first, last = starts[:, None], (starts + sides)[:, None]
        inside = ((first < centres) & (centres < last)).all(2)
        overlap = (np.minimum(last, high) - np.maximum(first, low)).clip(0).prod(2)
        union = sides.prod(1)[:, None] + areas - overlap
        valid = inside.any(1) & (overlap >= min_iou * union).all(1)
        if valid.any():
            break
    best = valid.argmax()
    (x1, y1), (x2, y2) = starts[best], starts[best] + sides[best]
    target = target[inside[best]]
    target[:, :4] = np.clip(target[:, :4], (x1, y1, x1, y1), (x2, y2, x2, y2)) - (x1, y1, x1, y1)
    return image[y1:y2, x1:x2], target


def photometric_distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast, hue and saturation, each with probability 1/2."""
    brightness, contrast, hue, saturation = rng.random(4) < 0.5
    return adjust_colours(image, brightness=rng.uniform(-32, 32) if brightness else 0,
                          contrast=rng.uniform(0.5, 1.5) if contrast else 1,
                          hue=rng.integers(-18, 18, endpoint=True) if hue else 0,
                          saturation=rng.uniform(0.5, 1.5) if saturation else 1)


def adjust_colours(image: np.ndarray, brightness: float = 0, contrast: float = 1, hue: int = 0,
                   saturation: float = 1) -> np.ndarray:
    """Add `brightness`, multiply by `contrast`, then turn the hue and scale the saturation.

    The hue is OpenCV's 8-bit one, of 180 steps, and wraps; other values saturate at 0 and 255.
    """
    levels = np.arange(256)
    if brightness != 0 or contrast != 1:
        image = cv2.LUT(image, _to_uint8(np.clip(levels + brightness, 0, 255) * contrast))
    if hue != 0 or saturation != 1:
        h, s, v = cv2.split(cv2.cvtColor(image, cv2.COLOR_BGR2HSV))
        if hue != 0:
            h = cv2.LUT(h, _to_uint8((levels + hue) % 180))
        if saturation != 1:
            s = cv2.LUT(s, _to_uint8(levels * saturation))
        image = cv2.cvtColor(cv2.merge((h, s, v)), cv2.COLOR_HSV2BGR)
    return image


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def mirror(image: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Swap left and right."""
    target = target.copy()
    target[:, [0, 2]] = image.shape[1] - target[:, [2, 0]]
    return cv2.flip(image, 1), target


def expand(width: int, height: int, rng: np.random.Generator,
           probability: float) -> tuple[int, int, int, int]:
    """Draw a canvas of up to 16 times the image's area, and the image's place on it.

    Returns (canvas width, canvas height, left, top). With probability 1 - `probability` the canvas
    is the image. No canvas is painted: `resize` paints the result directly.
    """
    if rng.random() >= probability:
        return width, height, 0, 0
    scale = rng.uniform(1, 4)
    aspect = np.sqrt(rng.uniform(max(0.5, scale**-2), min(2, scale**2)))
    # The bounds of `aspect` make both sides at least the image's; max() is for rounding.
    canvas_width = max(width, int(scale * aspect * width))
    canvas_height = max(height, int(scale / aspect * height))
    left = int(rng.integers(canvas_width - width + 1))
    top = int(rng.integers(canvas_height - height + 1))
    return canvas_width, canvas_height, left, top


def resize(image: np.ndarray, target: np.ndarray, canvas: tuple[int, int, int, int], size: int,
           interpolation: int, fill: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the image on its canvas (see `expand`), scaled to `size` x `size`, and its boxes.

    The image is scaled directly to its place, rounded to whole pixels of the result, and framed
    with the colour `fill`, because the canvas of a large photograph would take a gigabyte. The
    boxes follow the rounded place. Returns uint8 [size, size, 3] and float32 [n, 5], corners
    relative in 0..1 and the label.
    """
    height, width = image.shape[:2]
    canvas_width, canvas_height, left, top = canvas
    x1, x2 = (round(x * size / canvas_width) for x in (left, left + width))
    y1, y2 = (round(y * size / canvas_height) for y in (top, top + height))
    image = cv2.resize(image, (x2 - x1, y2 - y1), interpolation=interpolation)
    image = cv2.copyMakeBorder(image, y1, size - y2, x1, size - x2, cv2.BORDER_CONSTANT, value=fill)
    corners = target[:, :4].reshape(-1, 2, 2).astype(np.float64)  # float32 could round beyond 1
    corners = ((x1, y1) + corners * ((x2 - x1) / width, (y2 - y1) / height)) / size
    return image, np.hstack((corners.reshape(-1, 4), target[:, 4:])).astype(np.float32)
