"""Download and unpack Pascal VOC: `python -m data.scripts.voc 2007 [--root ~/data]`.

2007 gives trainval and test, 2012 gives trainval, as <root>/VOCdevkit/VOC<year>.
"""

import sys
from pathlib import Path

from utils.arguments import Parser
from utils.download import Place, extract_tar, fetch, unpacking_mark
from utils.errors import UserError, command

URL_BASE = "http://host.robots.ox.ac.uk/pascal/VOC"
# year -> (image set, archive, md5, images)
ARCHIVES = {
    "2007": (("trainval", "VOCtrainval_06-Nov-2007.tar", "c52e279531787c972589f7e41ab4ae64", 5011),
             ("test", "VOCtest_06-Nov-2007.tar", "b6e924de25625d8de591ea690078ad9f", 4952)),
    "2012": (
        ("trainval", "VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd", 11540),
    ),
}


def count_complete(year_dir: Path, image_set: str) -> int:
    """Return the number of images in an image set; 0 if a file or an annotation is missing."""
    listing = year_dir / "ImageSets" / "Main" / f"{image_set}.txt"
    if not listing.is_file():
        return 0
    ids = {line.split()[0] for line in listing.read_text().splitlines() if line.strip()}
    for folder, suffix in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
        directory = year_dir / folder
        if not directory.is_dir():
            return 0
        present = {p.stem for p in directory.iterdir() if p.suffix == suffix and p.stat().st_size}
        if not ids <= present:
            return 0
    return len(ids)


def get_voc(year: str, root: Path, url_base: str = URL_BASE) -> None:
    """Download and unpack the archives of a year below ``root``, except those that are complete.

    Raises:
        UserError: an archive cannot be downloaded, or lacks files that its image set lists.
    """
    year_dir = root / "VOCdevkit" / f"VOC{year}"
    for image_set, name, md5, count in ARCHIVES[year]:
        archive = root / name
        complete = count_complete(year_dir, image_set) == count
        if complete and not unpacking_mark(archive, root).exists():
            print(f"{year_dir}: {image_set} is already complete, {count} images")
            continue
        fetch([Place(f"{url_base.rstrip('/')}/voc{year}/{name}", f"md5:{md5}")], archive)
        print(f"unpacking {archive}", flush=True)
        extract_tar(archive, root)
        if count_complete(year_dir, image_set) != count:
            raise UserError(f"{archive} is unpacked, but {year_dir} lacks some of the {count} "
                            f"images or annotations of {image_set}; remove that folder and run "
                            "again")
        print(f"{year_dir}: {image_set}, {count} images ({archive} is no longer needed)")


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m data.scripts.voc",
        description="Download and unpack Pascal VOC. After an interruption, run it again to go on.",
    )
    parser.add_argument("year", choices=ARCHIVES)
    parser.add_argument("--root", type=Path, default=Path("~/data"),
                        help="folder that gets VOCdevkit/ (default: %(default)s)")
    parser.add_argument("--url-base", default=URL_BASE, metavar="URL",
                        help="mirror that holds voc2007/ and voc2012/ (default: %(default)s)")
    args = parser.parse_args(argv)
    get_voc(args.year, args.root.expanduser(), args.url_base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
