"""CVAT's own XML: boxes around shapes, subsets, where images lie, and what is refused."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from data import build_dataset, default_sets, find_layout
from data.skips import SkipKind
from utils.errors import UserError

META = "<meta><task><labels>{}</labels></task></meta>".format(
    "".join(f"<label><name>{name}</name><type>{kind}</type></label>"
            for name, kind in (("dog", "any"), ("cat", "rectangle"), ("spot", "points")))
)  # fmt: skip
BOX = '<box label="cat" xtl="40" ytl="20" xbr="60" ybr="60"/>'


def write(root: Path, images: dict[str, str], folder: str = "images", meta: str = META,
          more: str = "", size: str = 'width="100" height="80"') -> Path:
    """images: shapes of each image, such as ``a.png`` or ``a.png" subset="train``."""
    text = "".join(f'<image id="{i}" name="{name}" {size}>{shapes}</image>'
                   for i, (name, shapes) in enumerate(images.items()))  # fmt: skip
    for name in images:
        file, _, subset = name.replace("\\", "/").partition('" subset="')
        path = root / folder.format(subset) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.zeros((80, 100, 3), np.uint8))
    (root / "annotations.xml").write_text(f"<annotations>{meta}{text}{more}</annotations>")
    return root


def read(root: Path, name: str = "every", **options):
    (root / "ImageSets").mkdir(exist_ok=True)
    (root / "ImageSets/every.txt").write_text("a\n")
    return build_dataset("CVAT", root, [(None, name)], **options)


@pytest.mark.parametrize("shape, box", [
    ('box xtl="40.0" ytl="20.00" xbr="60" ybr="60"', [40, 20, 59, 59]),
    # 40 x 20 around (50, 40): a quarter turn swaps the sides, an eighth gives 60 / sqrt 2.
    ('box xtl="30" ytl="30" xbr="70" ybr="50" rotation="90"', [40, 20, 59, 59]),
    ('box xtl="30" ytl="30" xbr="70" ybr="50" rotation="-45"',
     [50 - 21.2132, 40 - 21.2132, 49 + 21.2132, 39 + 21.2132]),
    ('polygon points="10.5,8;30,8.25;20,72"', [10.5, 8, 29, 71]),
    ('ellipse cx="50" cy="40" rx="20" ry="10"', [30, 30, 69, 49]),
    ('ellipse cx="50" cy="40" rx="20" ry="10" rotation="90"', [40, 20, 59, 59]),
    ('mask rle="0, 4" left="7" top="8" width="20" height="3"', [7, 8, 26, 10]),
    ('box xtl="-5" ytl="20" xbr="60" ybr="99"', [0, 20, 59, 79]),  # leaves the image
])  # fmt: skip
def test_shape_gives_the_box_around_it(shape, box, tmp_path):
    data = read(write(tmp_path, {"a.png": f'<{shape} label="cat"/>'}))
    assert data.target(0) == pytest.approx(np.array([[*box, 2]]), abs=1e-3)
    assert data.classes == ("dog", "cat") and find_layout(tmp_path) == ("CVAT", "CVAT for images")


@pytest.mark.parametrize("shapes, words", [
    ('<box label="cat" xtl="x" ytl="2" xbr="6" ybr="6"/>', 'box 1 ("cat"): xtl "x"'),
    ('<box label="cat" xtl="1" ytl="2" xbr="6"/>', 'box 1 ("cat"): ybr'),
    ('<tag/><box xtl="1" ytl="2" xbr="6" ybr="9"/>', "box 2 label"),
    ('<polygon label="cat" points="1,2;3"/>', "polygon 1 3 numbers"),
    ('<polygon label="cat"/>', "polygon 1 points"),
    (BOX.replace('"40"', '"nan"'), 'xtl "nan"'), (BOX.replace('"40"', '"1e300"'), 'xtl "1e300"'),
    (BOX.replace("/>", ' rotation="inf"/>'), 'rotation "inf"'),
])  # fmt: skip
def test_shape_that_cannot_be_read_is_refused_by_file_image_and_value(shapes, words, tmp_path):
    write(tmp_path, {"a.png": BOX + shapes})
    words = words.replace(" 1 ", " 2 ").replace("box 2 label", "box 3 label")
    with pytest.raises(UserError) as error:
        read(tmp_path)
    said = str(error.value)
    assert all(word in said for word in ["annotations.xml", 'image 1 ("a.png")', *words.split()])
    faults: list[str] = []
    read(tmp_path, faults=faults)
    assert faults[0] == said


@pytest.mark.parametrize("how, words", [
    ({"more": '<x><box label="cat"/></x>'}, "<x> holds shapes"),
    ({"more": '<track id="0" label="cat"/>'}, "for video"), ({"images": {}}, "for images"),
    ({"size": 'width="0" height="80"'}, "0 x 80"), ({"more": "</x>"}, "malformed XML"),
    ({"images": {"a.png": '<points label="spot" points="1,2"/>'}}, "only points"),
    ({"images": {"a.png": BOX.replace('xbr="60"', 'xbr="40"')}}, "without area"),
    ({"images": {"a.png": BOX.replace("0", "1e-2")}}, "fractions of the image"),
    ({"more": '<image id="1" width="10" height="10"/>'}, "image 2 has no name"),
])  # fmt: skip
def test_file_without_images_or_boxes_is_refused_with_its_cause(how, words, tmp_path):
    write(tmp_path, **{"images": {"a.png": BOX}, **how})
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert str(tmp_path) in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("folder", ["images/{}", "images", "{}", ""])
def test_images_are_found_beside_or_by_subset_and_subsets_are_sets(folder, tmp_path):
    names = {'..\\in\\a.png" subset="train': BOX, 'b.png" subset="validation': BOX + "<tag/>"}
    root = write(tmp_path / "d", names, folder)
    train, test = default_sets("CVAT", root)
    assert (str(train[0]), str(test[0])) == ("train", "validation")
    assert read(root, "train").image_path(0).name == "a.png"
    kinds = [[skip.kind for skip in read(root, name).skipped] for name in ("train", "validation")]
    assert kinds == [[SkipKind.OUTSIDE_ROOT] * (folder == ""), [SkipKind.OTHER_SHAPE]]
    write(tmp_path / "two", {'b.png" subset="x': BOX, 'b.png" subset="y': BOX})
    with pytest.raises(UserError, match=r"image 1 .*image 2 .*both .*b\.png"):
        build_dataset("CVAT", tmp_path / "two", [(None, "x"), (None, "y")])
    (root / folder.format("validation") / "b.png").unlink()
    with pytest.raises(UserError, match=r"images missing \(1\).*b\.png.*copy"):
        read(root, "validation")
