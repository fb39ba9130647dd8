"""Download, describe and convert files of weights: ``python -m tools.weights``."""

from __future__ import annotations

import sys

from models.pretrained import main

if __name__ == "__main__":
    sys.exit(main())
