"""The HTML page of a data check."""

from collections import defaultdict
from html import escape

import cv2
import numpy as np

from inference.draw import resize
from tools.findings import Finding, Record, Report
from tools.image_check import read
from tools.mistakes import data_url

HEAD = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"/>
<meta name="viewport" content="width=device-width"/><title>Data check</title><style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: anywhere; }
h3.error { color: #e5484d; } h3.warning { color: #c77700; } h3.note { color: #8b939c; }
pre { overflow-x: auto; white-space: pre-wrap; }
.row { display: flex; flex-wrap: wrap; gap: .8rem; }
figure { margin: 0; width: min-content; min-width: 13rem; }
figure div { display: flex; gap: .5rem; }
figcaption { font-size: .8rem; }
</style></head><body><h1>Data check</h1>"""
SIDE = 208  # pixels of the longer side of an image
TRUE, ODD = (90, 200, 90), (40, 30, 230)  # BGR of boxes


def check_page(report: Report, shown: int = 12) -> str:
    """Return a data check as one HTML page; each finding shows its first `shown` images."""
    lines = [HEAD, *(f"<p>{escape(title)}</p>" for title in report.titles())]
    lines += [_finding(report, finding, shown) for finding in report.findings]
    return "\n".join([*lines, f"<pre>{escape(report.conclusion())}</pre></body></html>\n"])


def _finding(report: Report, finding: Finding, shown: int) -> str:
    # Records about the same images share a figure. A record without images stands alone.
    groups: dict[object, list[Record]] = defaultdict(list)
    for n, record in enumerate(finding.records):
        groups[record.images or n].append(record)
    figures, items = "", ""
    for records in [*groups.values()][:shown]:
        lines = [record.text.replace(f"{report.options.root}/", "") for record in records[:4]]
        lines += [f"and {len(records) - 4:,} more"] if len(records) > 4 else []
        text = "<br/>".join(map(escape, lines))
        if images := _draw(report, records):
            row = "".join(f'<img alt="" src="{data_url(image)}"/>' for image in images)
            figures += f"<figure><div>{row}</div><figcaption>{text}</figcaption></figure>"
        else:
            items += f"<li>{text}</li>"
    if len(groups) > shown:
        items += f"<li>and in {len(groups) - shown:,} more places</li>"
    title = f'<h3 class="{finding.level}">{escape(finding.title())}</h3>'
    return f'{title}<div class="row">{figures}</div><ul>{items}</ul>'


def _draw(report: Report, records: list[Record]) -> list[np.ndarray]:
    """Return the readable images of records with all boxes; the records' own boxes in the first."""
    drawn = []
    for n, (name, index) in enumerate(records[0].images):
        part = report.parts[name]
        pixels, _ = read(part.dataset, index)
        if pixels is None:
            continue
        scale = min(1, SIDE / max(pixels.shape[:2]))
        pixels = resize(pixels, scale)
        boxes = [(box, TRUE, 1) for box in part.boxes[part.images == index]]
        boxes += [(record.box, ODD, 2) for record in records if record.box and n == 0]
        for box, colour, line in boxes:
            # Coordinates far outside would overflow OpenCV's integers.
            ends = (np.multiply(box, scale) + 0.5).clip(-9, 1000).astype(int).tolist()
            cv2.rectangle(pixels, ends[:2], ends[2:], colour, line)
        drawn.append(pixels)
    return drawn
