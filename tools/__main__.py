"""List the commands of this folder: ``python -m tools``."""

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.arguments import did_you_mean
from utils.errors import UserError, command


def commands() -> dict[str, str]:
    """Return the first docstring line of every module in this folder that has a ``main``, by name.

    The modules are parsed, not imported: the list must not wait for PyTorch.
    """
    modules = {path.stem: ast.parse(path.read_text("utf-8"))
               for path in sorted(Path(__file__).parent.glob("[!_]*.py"))}
    return {name: (ast.get_docstring(module) or "").partition("\n")[0]
            for name, module in modules.items() if _has_main(module)}


def _has_main(module: ast.Module) -> bool:
    """Return whether a module defines or imports ``main``."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            return True
        if isinstance(node, ast.ImportFrom) and "main" in [alias.name for alias in node.names]:
            return True
    return False


@command
def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    found = commands()
    if words and words[0] not in ("-h", "--help"):
        known = words[0] if words[0] in found else "NAME" + did_you_mean(words[0], found)
        raise UserError(f"{words[0]} is not taken here; give python -m tools.{known}")
    width = max(map(len, found))
    print("Commands (python -m tools.NAME --help says more):")
    for name, line in found.items():
        print(f"  python -m tools.{name:<{width}}  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
