"""The notebook of docs/: its cells run in order, as Jupyter runs them, on a few images."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def cells(kind: str) -> list[str]:
    content = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text("utf-8"))
    return ["".join(c["source"]) for c in content["cells"] if c["cell_type"] == kind]


def run(tmp_path: Path, monkeypatch, **values: str) -> dict:
    """Run the cells and return their names; ``values`` replace right sides of assignments."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    values["WORK"] = f"Path({str(tmp_path)!r})"
    names: dict = {"__name__": "__main__"}
    for cell in cells("code"):
        for name, value in list(values.items()):
            cell, count = re.subn(rf"^{name} = .+$", f"{name} = {value}", cell, flags=re.MULTILINE)
            if count:
                del values[name]
        exec(compile(cell, "docs/tutorial.ipynb", "exec"), names)
    assert not values
    return names


def test_cells_run_in_order(tmp_path, monkeypatch, capsys):
    names = run(tmp_path, monkeypatch, IMAGES="12, 4", EPOCHS="1")
    output = capsys.readouterr().out
    assert "exit status 0" in output and names["results"]["metric"] == "VOC area AP@.5"
    assert re.search(r"^star +\d\.\d{3}$", output, re.MULTILINE)
    assert (tmp_path / "check.html").stat().st_size > 1000
    assert (tmp_path / "detections.png").stat().st_size > 10_000
    # A second call continues the run.
    run(tmp_path, monkeypatch, IMAGES="12, 4", EPOCHS="2")
    log = (tmp_path / "SSD_HarDNet39ds_300" / "run" / "log.jsonl").read_text().splitlines()
    assert [e for e in (json.loads(line).get("epoch") for line in log) if e] == [1, 2]


@pytest.mark.slow
def test_it_learns(tmp_path, monkeypatch):
    names = run(tmp_path, monkeypatch)
    assert names["results"]["value"] > 0.5


def test_it_is_kept_without_outputs():
    content = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text("utf-8"))
    for cell in content["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
