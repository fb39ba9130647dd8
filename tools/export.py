"""Write a detector as an ONNX or OpenVINO file: ``python -m tools.export``."""

from __future__ import annotations

import sys

from inference.export import main

if __name__ == "__main__":
    sys.exit(main())
