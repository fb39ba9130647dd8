"""`python -m tools` lists the commands of tools/."""

import subprocess
import sys
from pathlib import Path

from tools.__main__ import main

ROOT = Path(__file__).parent.parent


def test_every_command_is_listed_with_its_line():
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "tools"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0
    lines = [line.split(maxsplit=3) for line in done.stdout.splitlines()[1:]]
    listed = {name.removeprefix("tools."): text for _, _, name, text in lines}
    commands = {
        path.stem
        for path in (ROOT / "tools").glob("*.py")
        if "__name__ ==" in path.read_text("utf-8") and path.name != "__main__.py"
    }
    assert listed.keys() == commands >= {"check", "detect", "export", "report", "weights"}
    for name, text in listed.items():
        assert (ROOT / "tools" / f"{name}.py").read_text("utf-8").startswith(f'"""{text}')
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not {"torch", "numpy", "cv2"} & imported


def test_a_name_behind_a_space_is_refused(capsys):
    assert main(["detect", "best.pth"]) == 2
    assert "python -m tools.detect" in capsys.readouterr().err
