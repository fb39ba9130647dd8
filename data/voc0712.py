"""PASCAL VOC devkits and all layouts with an XML file an image."""

from collections.abc import Sequence

from data.annotated import AnnotatedImages
from data.annotation import Loaded
from data.voc_layout import list_image_sets, recognise
from data.voc_read import find_images, load_annotations


class VOCDetection(AnnotatedImages):
    """Samples of a VOC devkit or of a folder with XML annotations; boxes are the XML's values - 1.

    Args:
        root: see `data.voc_layout`.
        image_sets: (year, name) pairs such as ("2007", "trainval"), year None in a folder without
            years. A set is read from ImageSets/Main/<name>.txt or ImageSets/<name>.txt: one id or
            image file a line, which may hold spaces and folders; else it is the folder of its name.
        classes: names without background; label k is ``classes[k - 1]``. None: those of
            root/classes.txt or root/labelmap.txt, else `VOC_CLASSES` in a devkit whose chosen sets
            name no other, else all names in the annotations of root's image sets, sorted.
        transform, faults: see `AnnotatedImages`.

    An image is the file that has its annotation's name. The annotation's <filename> decides between
    several such files, and is looked for if there is none.

    Raises:
        UserError: missing image sets, annotations or images, malformed annotations, two
            annotations of one image, or no object of a known class.
    """

    offset = (1, 1, 1, 1)
    scores_dropped = True  # as published
    recognise = staticmethod(recognise)
    list_image_sets = staticmethod(list_image_sets)

    def load(self, classes: Sequence[str] | None, faults: list[str] | None) -> Loaded:
        listed, loaded = load_annotations(self.root, self.image_sets, classes, faults,
                                          self.val_share, self.split_by)
        images, skipped = find_images(listed, loaded.annotations, faults)
        return loaded._replace(images=images, skipped=loaded.skipped + skipped)
