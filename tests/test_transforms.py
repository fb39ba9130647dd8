"""The SSD augmentation against slow literal versions of its steps and hand-computed values."""

import itertools
import math
import random

import cv2
import numpy as np
import pytest

from data import transforms
from data.transforms import (
    INTERPOLATIONS,
    ResizeOnly,
    SSDAugmentation,
    adjust_colours,
    expand,
    mirror,
    photometric_distort,
    random_crop,
    resize,
    to_square,
)

MEAN = (104, 117, 123)
SAMPLES = 10_000
# The literal versions take a second for a thousand samples: these many now, the others as slow.
many_samples = pytest.mark.parametrize("samples",
                                       [1000, pytest.param(SAMPLES, marks=pytest.mark.slow)])


def image_of(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def coordinates(width=200, height=160):
    """An image whose pixel (x, y) has the colour (x, y, 0)."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(width)
    image[..., 1] = np.arange(height)[:, None]
    return image


def target_of(*rows):
    return np.array(rows, np.float32).reshape(-1, 5)


def random_target(rng, width, height, count):
    """Boxes of at least a hundredth of a pixel, anywhere in the image, labels 1, 2, ..."""
    low = rng.random((count, 2)) * (width, height) * 0.98
    high = low + (0.01 + 0.99 * rng.random((count, 2))) * ((width, height) - low)
    return np.hstack((low, high, 1 + np.arange(count)[:, None])).astype(np.float32)


def same_distribution(ours, theirs):
    """Two-sample Kolmogorov-Smirnov test at the 0.1 % level, of four decimals."""
    ours, theirs = (np.sort(np.round(np.float64(a), 4)) for a in (ours, theirs))
    points = np.concatenate((ours, theirs))
    steps = [np.searchsorted(a, points, side="right") / len(a) for a in (ours, theirs)]
    limit = 1.95 * math.sqrt(1 / len(ours) + 1 / len(theirs))
    return np.abs(steps[0] - steps[1]).max() < limit


def occurs_with(probability, hits):
    """Binomial test: within four standard deviations."""
    deviation = math.sqrt(probability * (1 - probability) / len(hits))
    return abs(np.mean(hits) - probability) < 4 * deviation


def literal_iou(a, b):
    w = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area_a, area_b = ((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
    return w * h / (area_a + area_b - w * h)


def literal_crop(width, height, boxes, draw):
    """The crop (x1, y1, x2, y2) of step 1 and the indices of the boxes it keeps."""
    while True:
        choice = draw.choice(["no crop", 0.1, 0.3, 0.5, 0.7, 0.9, "no limit"])
        if choice == "no crop":
            return (0, 0, width, height), [*range(len(boxes))]
        for _ in range(50):
            u = draw.uniform(0.3, 1)
            aspect = math.sqrt(draw.uniform(max(0.5, u * u), min(2, 1 / (u * u))))
            w, h = int(u * aspect * width), int(u / aspect * height)
            x, y = draw.randint(0, width - w), draw.randint(0, height - h)
            crop = (x, y, x + w, y + h)
            if choice != "no limit" and any(literal_iou(box, crop) < choice for box in boxes):
                continue
            kept = [i
                    for i, (x1, y1, x2, y2) in enumerate(boxes) if crop[0] < (x1 + x2) / 2 < crop[2]
                    and crop[1] < (y1 + y2) / 2 < crop[3]]
            if kept:
                return crop, kept


def literal_expand(width, height, draw):
    """The canvas (width, height, left, top) of step 3."""
    if draw.random() < 0.6:
        for _ in range(50):
            u = draw.uniform(1, 4)
            aspect = math.sqrt(draw.uniform(max(0.5, 1 / (u * u)), min(2, u * u)))
            w, h = int(u * aspect * width), int(u / aspect * height)
            if w >= width and h >= height:
                return w, h, draw.randint(0, w - width), draw.randint(0, h - height)
    return width, height, 0, 0


def literal_colours(image, brightness=0.0, contrast=1.0, hue=0, saturation=1.0):
    """Step 2, number by number in floating point; OpenCV's HSV."""

    def rounded(values):
        return np.round(np.clip(values, 0, 255)).astype(np.uint8)

    bright = np.clip(image.astype(np.float64) + brightness, 0, 255)
    image = rounded(bright * contrast)
    if hue == 0 and saturation == 1:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(int) + hue) % 180
    hsv[..., 1] = rounded(hsv[..., 1] * saturation)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)


def literal_canvas(image, canvas, size, interpolation):
    """Steps 3 and 5 with a real canvas."""
    width, height, left, top = canvas
    whole = np.empty((height, width, 3), np.uint8)
    whole[:] = MEAN
    whole[top : top + image.shape[0], left : left + image.shape[1]] = image
    return cv2.resize(whole, (size, size), interpolation=interpolation)


@many_samples
@pytest.mark.parametrize("boxes", [
    [(0, 0, 200, 160)],  # the whole image
    [(5, 5, 8, 9)],  # tiny
    [(10, 10, 60, 60), (100, 90, 180, 150)],
    [(20, 20, 180, 150), (40, 30, 150, 140)],  # a box in a box
])  # fmt: skip
def test_crops_are_distributed_as_in_the_literal_version(boxes, samples):
    image, draw, rng = coordinates(), random.Random(1), np.random.default_rng(1)
    target = target_of(*[(*box, 1 + i) for i, box in enumerate(boxes)])
    ours, theirs = [], []
    for _ in range(samples):
        view, kept = random_crop(image, target, rng)
        x, y, _ = view[0, 0].astype(int)
        ours.append((x, y, view.shape[1], view.shape[0], len(kept)))
        (x1, y1, x2, y2), indices = literal_crop(200, 160, boxes, draw)
        theirs.append((x1, y1, x2 - x1, y2 - y1, len(indices)))
    ours, theirs = np.array(ours), np.array(theirs)
    for a, b in zip(ours.T, theirs.T, strict=True):
        assert same_distribution(a, b)
    assert same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    assert same_distribution(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3])
    # Uncropped images are frequent enough to be counted by themselves.
    uncropped = [np.mean((a[:, 2] == 200) & (a[:, 3] == 160)) for a in (ours, theirs)]
    assert abs(uncropped[0] - uncropped[1]) < 4 * math.sqrt(2 * 0.25 / samples)


def test_a_crop_keeps_and_clips_the_boxes_with_their_centre_inside():
    image, rng = coordinates(), np.random.default_rng(3)
    target = target_of((20, 20, 90, 100, 3), (80, 60, 190, 150, 7), (150, 10, 170, 30, 9))
    sizes = set()
    for _ in range(300):
        view, kept = random_crop(image, target, rng)
        x, y, _ = view[0, 0].astype(int)
        height, width = view.shape[:2]
        np.testing.assert_array_equal(view, image[y : y + height, x : x + width])
        expected = []
        for x1, y1, x2, y2, label in target.tolist():
            if x < (x1 + x2) / 2 < x + width and y < (y1 + y2) / 2 < y + height:
                corners = max(x1, x), max(y1, y), min(x2, x + width), min(y2, y + height)
                shifted = [a - b for a, b in zip(corners, (x, y, x, y), strict=True)]
                expected.append([*shifted, label])
        assert kept.tolist() == expected and kept.dtype == np.float32
        sizes.add(len(kept))
    assert sizes == {1, 2, 3}


def test_only_no_crop_is_left_to_a_box_that_no_crop_can_keep_and_to_an_image_without_boxes():
    # The middle of a box around the last corner is never inside, nor is its IoU ever over 0.
    rng = np.random.default_rng(4)
    for target in (target_of((199.9999, 159.9999, 200.0001, 160.0001, 1)), target_of()):
        for _ in range(20):
            view, kept = random_crop(coordinates(), target, rng)
            assert view.shape == (160, 200, 3) and np.array_equal(kept, target)


def test_colours_equal_the_literal_version():
    image = image_of(67, 45)
    before = image.copy()
    for change in ((31.7,), (-31.7,), (0, 0.5), (0, 1.5), (0, 1, 18), (0, 1, -18), (0, 1, 0, 0.5),
                   (0, 1, 0, 1.5), (-20.2, 1.4), (20.2, 0.6), (12.3, 1.2, 7, 0.8)):  # fmt: skip
        np.testing.assert_array_equal(adjust_colours(image, *change),
                                      literal_colours(image, *change), str(change))
    np.testing.assert_array_equal(image, before)


def test_each_colour_change_is_drawn_half_of_the_time_within_its_limits(monkeypatch):
    drawn = []
    monkeypatch.setattr(transforms, "adjust_colours", lambda image, **change: drawn.append(change))
    rng = np.random.default_rng(7)
    for _ in range(SAMPLES):
        photometric_distort(None, rng)
    applied = {}
    for name, neutral, low, high in (("brightness", 0, -32, 32), ("contrast", 1, 0.5, 1.5),
                                     ("hue", 0, -18, 18), ("saturation", 1, 0.5, 1.5)):  # fmt: skip
        values = np.array([change[name] for change in drawn])
        applied[name] = values != neutral
        # One of the 37 whole turns of the hue is none.
        assert occurs_with(0.5 * 36 / 37 if name == "hue" else 0.5, applied[name])
        uniform = np.random.default_rng(0).uniform(low, high, SAMPLES)
        uniform = np.round(uniform * 37 / 36) if name == "hue" else uniform
        assert same_distribution(values[applied[name]], uniform[uniform != neutral])
        assert low <= values.min() and values.max() <= high
    for one, other in itertools.combinations(applied.values(), 2):
        assert occurs_with(0.25, one & other)  # independent of each other


@pytest.mark.parametrize(("width", "height"), [(500, 375), (10, 2000), (3, 4)])
def test_canvases_are_distributed_as_in_the_literal_version(width, height):
    rng, draw = np.random.default_rng(8), random.Random(8)
    ours = np.array([expand(width, height, rng, 0.6) for _ in range(5000)])
    theirs = np.array([literal_expand(width, height, draw) for _ in range(5000)])
    for k in range(4):
        assert same_distribution(ours[:, k], theirs[:, k])
    scales = [a[:, 0] / width * a[:, 1] / height for a in (ours, theirs)]
    aspects = [a[:, 0] / width / (a[:, 1] / height) for a in (ours, theirs)]
    places = [a[:, 2] / np.maximum(a[:, 0] - width, 1) for a in (ours, theirs)]
    for pair in (scales, aspects, places):
        assert same_distribution(*pair)
    assert (ours[:, 2:] >= 0).all() and (ours[:, 2:] + (width, height) <= ours[:, :2]).all()


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_an_expanded_image_is_within_half_a_pixel_of_a_real_canvas(interpolation):
    image, canvas = image_of(64, 32), (128, 128, 32, 64)
    if interpolation in (cv2.INTER_AREA, cv2.INTER_NEAREST):  # on the grid of the result: equal
        ours, _ = resize(image, target_of(), canvas, 64, interpolation, MEAN)
        np.testing.assert_array_equal(ours, literal_canvas(image, canvas, 64, interpolation))
    rng, size = np.random.default_rng(10), 128
    y, x = np.mgrid[:150, :200]
    image = np.stack((x, y + 50, 255 - x), -1).astype(np.uint8)  # one level a pixel
    target = target_of((30, 20, 150, 120, 4))
    for _ in range(20):
        canvas = expand(200, 150, rng, 0.6)
        width, height, left, top = canvas
        ours, boxes = resize(image, target, canvas, size, interpolation, MEAN)
        expected = literal_canvas(image, canvas, size, interpolation)
        x1, x2 = (left + 12) * size // width + 1, (left + 188) * size // width
        y1, y2 = (top + 12) * size // height + 1, (top + 138) * size // height
        inner = np.abs(ours.astype(int) - expected)[y1:y2, x1:x2]
        # Half a pixel of the result is up to width / size / 2 source pixels, nearest adds another.
        assert inner.max() <= 1.5 * max(width, height) / size + 1
        outside = np.ones((size, size), bool)
        outside[max(0, (top - 12) * size // height - 1) : (top + 162) * size // height + 2,
                max(0, (left - 12) * size // width - 1) : (left + 212) * size // width + 2] = False
        assert (ours[outside] == MEAN).all()
        literal = (target[:, :4] + (left, top, left, top)) / (width, height, width, height)
        assert np.abs(boxes[:, :4] - literal).max() <= 0.5 / size + 1e-6
        assert boxes[0, 4] == 4


def test_mirror_equals_the_hand_computed_one():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    target = target_of((1, 0, 2, 1, 5), (0, 0, 4, 2, 6))
    before = target.copy()
    mirrored, boxes = mirror(image, target)
    assert mirrored[0].tolist() == [[9, 10, 11], [6, 7, 8], [3, 4, 5], [0, 1, 2]]
    assert boxes.tolist() == [[2, 0, 3, 1, 5], [0, 0, 4, 2, 6]]
    np.testing.assert_array_equal(target, before)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("width", "height"), [(1, 1), (10, 2000), (48, 48)])
def test_an_image_without_canvas_is_simply_resized(interpolation, width, height):
    image = image_of(width, height)
    target = target_of((0, 0, width, height, 2), (width / 4, 0, width / 2, height / 2, 3))
    ours, boxes = resize(image, target, (width, height, 0, 0), 48, interpolation, MEAN)
    np.testing.assert_array_equal(ours, cv2.resize(image, (48, 48), interpolation=interpolation))
    assert boxes.tolist() == [[0, 0, 1, 1, 2], [0.25, 0, 0.5, 0.5, 3]]


@pytest.mark.parametrize("size", [300, 512])
def test_evaluation_sees_the_image_resized_bilinearly_and_overfitting_all_boxes_too(size):
    image = image_of(123, 77)
    target = target_of((0, 0, 123, 77, 2), (12.3, 7.7, 12.4, 7.8, 5))
    before = image.copy(), target.copy()
    result, boxes = ResizeOnly(size)(image, target, np.random.default_rng(0))
    expected = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
    for found in (result, to_square(image, size)):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.uint8 and found.flags.c_contiguous
    np.testing.assert_allclose(boxes[0], (0, 0, 1, 1, 2))
    np.testing.assert_allclose(boxes[1], (0.1, 0.1, 12.4 / 123, 7.8 / 77, 5), rtol=1e-5)
    assert boxes.dtype == np.float32
    assert np.array_equal(image, before[0]) and np.array_equal(target, before[1])
    assert ResizeOnly(size)(image, target_of(), None)[1].shape == (0, 5)


@many_samples
@pytest.mark.parametrize("expansion", [0.6, 0.2, 0])
def test_mirror_expansion_and_interpolation_have_their_frequencies(monkeypatch, samples, expansion):
    # Colours that grow to the right survive every change of colour; the box is the image, so
    # what is returned of it is the image's place in the result.
    image = np.repeat(np.linspace(70, 180, 160).astype(np.uint8)[None, :, None], 120, 0)
    image = np.ascontiguousarray(np.broadcast_to(image, (120, 160, 3)))
    target, augment = target_of((0, 0, 160, 120, 1)), SSDAugmentation(64, expansion=expansion)
    interpolations, mirrored, expanded = [], [], []
    original = cv2.resize

    def spy(image, size, interpolation):
        interpolations.append(interpolation)
        return original(image, size, interpolation=interpolation)

    monkeypatch.setattr(transforms.cv2, "resize", spy)
    for index in range(samples):
        result, boxes = augment(image, target, np.random.default_rng((0, 1, index)))
        x1, y1, x2, y2 = np.round(boxes[0, :4] * 64).astype(int)
        row = result[(y1 + y2) // 2, x1:x2].sum(1, dtype=int)
        mirrored.append(row[0] > row[-1])
        expanded.append((x2 - x1) * (y2 - y1) < 64 * 64)
    assert occurs_with(0.5, mirrored)
    # Of scales in [1, 4] about one in 400 is too small to be seen in 64 pixels.
    assert np.mean(expanded) == pytest.approx(expansion, abs=0.0375)
    assert len(interpolations) == samples
    for interpolation in INTERPOLATIONS:
        assert occurs_with(0.2, np.array(interpolations) == interpolation)
    assert len(set(INTERPOLATIONS)) == 5


def literal_sample(width, height, boxes, draw):
    """The place of every kept box in the result, by the steps in their published order."""
    (x1, y1, x2, y2), kept = literal_crop(width, height, boxes, draw)
    canvas_width, canvas_height, left, top = literal_expand(x2 - x1, y2 - y1, draw)
    mirrored = draw.random() < 0.5
    result = []
    for i in kept:
        a, b = (min(max(boxes[i][k], x1), x2) - x1 + left for k in (0, 2))
        c, d = (min(max(boxes[i][k], y1), y2) - y1 + top for k in (1, 3))
        if mirrored:
            a, b = canvas_width - b, canvas_width - a
        box = a / canvas_width, c / canvas_height, b / canvas_width, d / canvas_height
        if box[2] - box[0] >= 0.01 and box[3] - box[1] >= 0.01:
            result.append((*box, 1 + i))
    return result or [
        (box[0] / width, box[1] / height, box[2] / width, box[3] / height, 1 + i)
        for i, box in enumerate(boxes)
    ]


@many_samples
def test_whole_samples_are_distributed_as_in_the_literal_version(monkeypatch, samples):
    # The places of boxes are compared, colours and interpolations above; these cost the time.
    monkeypatch.setattr(transforms, "adjust_colours", lambda image, **change: image)
    monkeypatch.setattr(transforms, "INTERPOLATIONS", (cv2.INTER_NEAREST,) * 5)
    # Some boxes are near the 1 % limit, so that dropping and the fall-back both happen.
    boxes, image = [(50, 30, 57, 38), (60, 20, 180, 150), (90, 100, 94, 104)], coordinates()
    target = target_of(*[(*box, 1 + i) for i, box in enumerate(boxes)])
    augment, rng, draw = SSDAugmentation(300), np.random.default_rng(12), random.Random(12)
    for chosen in ([0, 1, 2], [0, 2]):
        rows = target[chosen]
        rows[:, 4] = 1 + np.arange(len(rows))
        some = [boxes[i] for i in chosen]
        ours = [augment(image, rows, rng)[1] for _ in range(samples)]
        theirs = [np.array(literal_sample(200, 160, some, draw)) for _ in range(samples)]
        assert same_distribution([len(a) for a in ours], [len(a) for a in theirs])
        ours, theirs = np.concatenate(ours), np.concatenate(theirs)
        for label in range(1, len(chosen) + 1):
            a, b = (rows[rows[:, 4] == label] for rows in (ours, theirs))
            for k in range(4):
                assert same_distribution(a[:, k], b[:, k])
            for k in range(2):
                assert same_distribution(a[:, k + 2] - a[:, k], b[:, k + 2] - b[:, k])


@pytest.mark.parametrize("size", [300, 512])
@pytest.mark.parametrize(("width", "height"),
                         [(1, 1), (2, 1), (1, 7), (10, 2000), (2000, 10), (3, 3), (333, 217)])
def test_every_sample_of_any_image_is_well_formed(width, height, size):
    image, rng = image_of(width, height), np.random.default_rng((width, height))
    augment = SSDAugmentation(size)
    for count in (0, 1, 1, 2, 5, 20):
        target = random_target(rng, width, height, count)
        before = image.copy(), target.copy()
        result, boxes = augment(image, target, rng)
        assert result.shape == (size, size, 3) and result.dtype == np.uint8
        assert result.flags.c_contiguous
        assert boxes.dtype == np.float32 and boxes.shape[1:] == (5,)
        assert (count > 0) == (len(boxes) > 0)
        assert (boxes[:, :4] >= 0).all() and (boxes[:, :4] <= 1).all()
        assert (boxes[:, 2:4] > boxes[:, :2]).all()
        assert set(boxes[:, 4]) <= set(target[:, 4]) and len(set(boxes[:, 4])) == len(boxes)
        assert np.array_equal(image, before[0]) and np.array_equal(target, before[1])


def test_the_fall_back_is_the_untouched_image_with_all_its_boxes():
    image, augment, fallen = image_of(200, 200), SSDAugmentation(64), 0
    target = target_of((100, 100, 102.5, 102.5, 8), (50, 50, 51, 51, 9))
    untouched = [cv2.resize(image, (64, 64), interpolation=i).tobytes() for i in INTERPOLATIONS]
    for index in range(200):
        result, boxes = augment(image, target, np.random.default_rng(index))
        if len(boxes) == 2 and np.allclose(boxes[:, :4] * 200, target[:, :4]):
            fallen += result.tobytes() in untouched
        else:
            # Snapped to whole pixels, a place of at least 64 / (4 * sqrt(2)) may lose half of one.
            assert (boxes[:, 2:4] - boxes[:, :2] > 0.01 * (1 - 0.5 / 11) - 1e-6).all()
    assert 40 < fallen < 160


def test_a_box_of_exactly_one_percent_is_kept(monkeypatch):
    monkeypatch.setattr(transforms, "random_crop", lambda image, target, rng: (image, target))
    monkeypatch.setattr(transforms, "expand", lambda width, height, *_: (width, height, 0, 0))
    image = image_of(300, 200)
    target = target_of((100, 50, 103, 52, 1), (100, 50, 102.9, 90, 2), (100, 50, 200, 51.9, 3))
    for index in range(10):
        _, boxes = SSDAugmentation(300)(image, target, np.random.default_rng(index))
        assert boxes[:, 4].tolist() == [1]


def test_the_mean_frames_an_expanded_image():
    image, mean = np.zeros((40, 40, 3), np.uint8), (10, 200, 30)
    augment, framed = SSDAugmentation(64, mean=mean), 0
    for index in range(50):
        result, boxes = augment(image, target_of((0, 0, 40, 40, 1)), np.random.default_rng(index))
        x1, y1, x2, y2 = np.round(boxes[0, :4] * 64).astype(int)
        frame = np.ones((64, 64), bool)
        frame[y1:y2, x1:x2] = False
        assert (result[frame] == mean).all()
        assert (result[~frame] <= 32).all()  # black, but for the brightness
        framed += frame.any()
    assert framed > 15


def test_a_sample_depends_on_its_seed_alone():
    image, augment = image_of(200, 150)[10:130, 20:180], SSDAugmentation(300)  # a view
    target = target_of((20, 20, 90, 100, 3), (80, 60, 150, 110, 7))
    for index in range(20):
        np.random.seed(index)  # noqa: NPY002
        random.seed(index)
        first = augment(image, target, np.random.default_rng((1, 2, index)))
        augment(image, target, np.random.default_rng(99))
        again = SSDAugmentation(300)(image.copy(), target, np.random.default_rng((1, 2, index)))
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)
    other = augment(image, target, np.random.default_rng((1, 3, 19)))
    assert not np.array_equal(first[0], other[0])
