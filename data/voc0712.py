"""PASCAL VOC devkits and folders in VOC layout."""

from __future__ import annotations

from collections.abc import Sequence

from data.annotated import AnnotatedImages
from data.annotation import Loaded
from data.voc_xml import find_images, list_image_sets, load_annotations


class VOCDetection(AnnotatedImages):
    """Samples of a VOC devkit or of a folder in VOC layout; boxes are the XML's values - 1.

    Args:
        root: a devkit (VOC2007/, VOC2012/, ...), or a folder with Annotations/, JPEGImages/ and
            ImageSets/.
        image_sets: (year, name) pairs such as ("2007", "trainval"), year None in a folder without
            years. A set is read from ImageSets/Main/<name>.txt or ImageSets/<name>.txt: one id a
            line, which may hold spaces and folders.
        classes: names without background; label k is ``classes[k - 1]``. None: those of
            root/classes.txt, else `VOC_CLASSES` in a devkit whose chosen sets name no other, else
            all names in the annotations of root's image sets, sorted.
        transform, faults: see `AnnotatedImages`.

    Raises:
        UserError: missing image sets, annotations or images, malformed annotations, or no object
            of a known class.
    """

    list_image_sets = staticmethod(list_image_sets)

    def load(self, classes: Sequence[str] | None, faults: list[str] | None) -> Loaded:
        found = load_annotations(self.root, self.image_sets, classes, faults)
        images = find_images(found, faults)
        return Loaded(found.ids, images, found.annotations, found.classes, found.skipped)
