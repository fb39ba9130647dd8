"""The demo."""

from __future__ import annotations

import json

import pytest

from demo import run


@pytest.mark.slow
def test_demo_learns_to_detect(tmp_path):
    """The demo as a user runs it: about seven minutes on two cores with bfloat16 instructions."""
    assert run.main(["--output", str(tmp_path)]) == 0
    (results,) = tmp_path.glob("runs/*/*/ss_predict/*/test/results.json")
    assert json.loads(results.read_text())["value"] > 0.35
