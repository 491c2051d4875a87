"""Which platform a command starts on."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from mila_jax.runtime import choose_platform, tpu_present


def make(root, *files, **pci):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    for address, (vendor, device) in pci.items():
        folder = root / "sys/bus/pci/devices" / address
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "device").write_text(device + "\n")


@pytest.mark.parametrize(
    "files, pci, there",
    [
        ((), {}, False), (("dev/accel0",), {}, True), (("dev/vfio/0",), {"a": ("0x1ae0", "0x0063")}, True),
        (("dev/vfio/0",), {"a": ("0x1ae0", "0x0042")}, False), (("dev/vfio/0",), {"a": ("0x10de", "0x2330")}, False), ((), {"a": ("0x1ae0", "0x0063")}, False),
    ],
)  # fmt: skip
def test_tpus_are_found_by_their_device_nodes(tmp_path, files, pci, there):
    make(tmp_path, *files, **pci)
    assert tpu_present(tmp_path) == there


@pytest.mark.parametrize("libtpu, environment, files, chosen", [(True, "", (), "cpu"), (True, "", ("dev/accel0",), None), (False, "", (), None), (True, "tpu", (), None)])
def test_cpu_is_chosen_only_where_libtpu_would_look_in_vain(tmp_path, monkeypatch, libtpu, environment, files, chosen):
    make(tmp_path, *files)
    monkeypatch.setenv("JAX_PLATFORMS", environment)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if libtpu and name == "libtpu" else None)
    assert choose_platform(tmp_path) == chosen


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None or tpu_present(), reason="needs libtpu installed and no TPU")
def test_with_libtpu_and_no_tpu_jax_starts_quietly_on_the_cpu(tmp_path):
    code = "from mila_jax.runtime import setup; setup(); import jax; print(jax.devices()[0].platform)"
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | {"MILA_CACHE": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, cwd=pathlib.Path(__file__).parents[1])
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "cpu", "")
