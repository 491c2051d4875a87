"""Which platform a command starts on."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from mila_jax import runtime
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


@pytest.mark.parametrize(
    "libtpu, environment, files, chosen", [(True, "", (), "cpu"), (True, "", ("dev/accel0",), None), (False, "", (), None), (True, "tpu", (), None)]
)
def test_cpu_is_chosen_only_where_libtpu_would_look_in_vain(tmp_path, monkeypatch, libtpu, environment, files, chosen):
    make(tmp_path, *files)
    monkeypatch.setenv("JAX_PLATFORMS", environment)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if libtpu and name == "libtpu" else None)
    assert choose_platform(tmp_path) == chosen


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None or tpu_present(), reason="needs libtpu installed and no TPU")
def test_with_libtpu_and_no_tpu_jax_starts_quietly_on_the_cpu(tmp_path):
    code = "from mila_jax.runtime import setup; setup(); import jax; print(jax.devices()[0].platform)"
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | {"MILA_CACHE": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, cwd=pathlib.Path(__file__).parents[1]
    )
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "cpu", "")


def test_cpu_flags_leave_what_is_set(monkeypatch):
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(runtime, "tidy_after_compiling", lambda: None)
    monkeypatch.setattr(runtime.importlib.metadata, "version", lambda name: "0.10.2")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=256 --xla_other=1")
    runtime.setup_cpu()
    assert os.environ["XLA_FLAGS"].split()[:2] == ["--xla_cpu_prefer_vector_width=256", "--xla_other=1"]
    assert os.environ["XLA_FLAGS"].count("prefer_vector_width") == 1 and "ynn_fusion_type" in os.environ["XLA_FLAGS"]
    monkeypatch.setattr(runtime.importlib.metadata, "version", lambda name: "0.11.0")
    monkeypatch.setenv("XLA_FLAGS", "")
    runtime.setup_cpu()
    assert os.environ["XLA_FLAGS"] == ""


@pytest.mark.parametrize(
    "environment, files, cpu",
    [("cpu", ("dev/accel0",), True), ("tpu", (), False), ("", (), True), ("", ("dev/accel0",), False), ("", ("dev/nvidia0",), False)],
)
def test_where_there_is_no_accelerator_it_is_the_cpu(tmp_path, monkeypatch, environment, files, cpu):
    make(tmp_path, *files)
    monkeypatch.setenv("JAX_PLATFORMS", environment)
    assert runtime.runs_on_cpu(tmp_path) == cpu


@pytest.mark.parametrize("threshold, tidied", [(0.0, True), (1e6, False)])
def test_the_heap_is_tidied_after_long_compiling_only(monkeypatch, threshold, tidied):
    calls, listeners = [], []
    monkeypatch.setattr(runtime, "set_fragments_aside", lambda: calls.append(1))
    monkeypatch.setattr(runtime, "_LONG_COMPILE", threshold)
    register = jax.monitoring.register_event_duration_secs_listener
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", lambda f: (listeners.append(f), register(f)))
    runtime.tidy_after_compiling.__wrapped__()
    try:
        jax.jit(lambda x: x * 3 + threshold)(1.5)
    finally:
        jax.monitoring.unregister_event_duration_listener(listeners[0])
    assert bool(calls) == tidied
