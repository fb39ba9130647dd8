"""Download, inspect and convert files of weights.

    python -m tools.weights list
    python -m tools.weights download NAME [--to DIR]
    python -m tools.weights inspect FILE [--json]
    python -m tools.weights convert IN OUT          # .pth <-> .safetensors

Exit status: 0 done, 1 unexpected failure, 2 bad usage or bad input, 130 interrupted.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from models.pretrained import PUBLISHED, WEIGHTS, Contents, convert, download, examine, published
from utils.arguments import Parser
from utils.checkpoint import list_keys
from utils.errors import command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="python -m tools.weights",
               description="Published weights, and files of weights.")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="list the published files: what they fit, and where they are")
    c = commands.add_parser("download", help="download a published file, and verify it")
    c.add_argument("name", metavar="NAME", help="a name of the list, or hf://ORG/REPO/FILE[@REVISION]")
    c.add_argument("--to", metavar="DIR", default=WEIGHTS, help="folder (default: weights)")
    c = commands.add_parser("inspect", help="say what a file holds, without running its code")
    c.add_argument("file", metavar="FILE")
    c.add_argument("--json", action="store_true", help="print everything as JSON")
    c = commands.add_parser("convert", help="convert .pth to .safetensors, or back")
    c.add_argument("source", metavar="IN")
    c.add_argument("target", metavar="OUT")
    return p.parse_args(argv)


def describe(found: Contents) -> str:
    """Return the contents of a file as lines of text; lists are cut at 20 names."""
    dtypes = ", ".join(f"{count} {name}" for name, count in found.dtypes.items())
    lines = {"file": f"{found.file} ({found.bytes:,} bytes)", "sha256": found.sha256,
             "git blob": found.git_blob, "origin": "unknown", "holds": ", ".join(found.holds),
             "tensors": f"{found.tensors} ({dtypes}), {found.parameters:,} parameters",
             "detector": "none", "basenet of": ", ".join(found.basenet) or "none"}
    if found.origin:
        row = published(found.origin)
        lines["origin"] = f"{row.name}, {row.places[0].url}, licence {row.licence}"
    if found.version:
        lines["detector"] = found.closest
        lines["classes"] = ", ".join(found.classes or ["(names are not in the file)"])
    elif found.missing or found.unused or found.wrong:
        lines["compared to"] = found.closest
        keys = {"missing": found.missing, "unused": found.unused, "other shape": found.wrong}
        lines |= {title: list_keys(names) for title, names in keys.items() if names}
        if found.not_compared:
            lines["but"] = "; ".join(found.not_compared)
    return "\n".join(f"{title:<12} {text}" for title, text in lines.items())


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.command == "list":
        for row in PUBLISHED:
            print(f"{row.name:<22} {row.file}\n  {row.fits}; licence {row.licence}")
            for url, checksum in row.places:
                print(f"  {url}\n  {checksum or 'no hash known: its tensors are checked'}")
    elif args.command == "download":
        print(download(args.name, args.to))
    elif args.command == "inspect":
        found = examine(args.file)
        print(json.dumps(asdict(found), indent=1) if args.json else describe(found))
    else:
        left_out = convert(args.source, args.target)
        note = f" (left out: {', '.join(left_out)})" if left_out else ""
        print(f"{args.target}{note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
