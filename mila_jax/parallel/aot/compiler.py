"""Runs `child` and brings back what the compiler made of a step, or why it made nothing.

Fast mode reads the scheduled program and the buffer report that the compiler writes on its way, and ends the process there: the
rest of a compilation (minutes) would add only the compiler's own cycle estimates, which full mode waits for.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from mila_jax.errors import UserError

INSTALL = 'pip install "jax[tpu]"'
ROOT = pathlib.Path(__file__).parents[3]

# One setting serves every chip: the type names a slice that this machine pretends to be a host of, not the one compiled for.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0", "TPU_LOG_DIR": "disabled", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3", "GRPC_VERBOSITY": "NONE",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # without it a second process stops at a lock file
}  # fmt: skip
KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SYSTEMROOT")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """text: the optimised program, None if there is none; memory: bytes of one device (`peak` always, with `source`); failure: one line
    on why the compiler refused, None if it did not; seconds: wall time of the process; arguments: unpadded bytes of state and batch; passing:
    the process ended without a verdict (killed, a full disk, a bug), so that another one may say something else."""

    text: str | None
    memory: dict
    failure: str | None
    seconds: float
    arguments: int | None = None
    passing: bool = False


def require_compiler() -> None:
    """Raises `UserError` with the install command when the TPU compiler (libtpu) is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"mila plan needs the TPU compiler (libtpu), which is not installed; run: {INSTALL} (no TPU is needed)")


def environment() -> dict[str, str]:
    """Variables of the child: nothing of the user's flags for XLA, JAX or libtpu gets in."""
    return {k: v for k, v in os.environ.items() if k in KEPT} | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}


def memory_report(text: str) -> dict[str, int]:
    """Bytes of each memory space of a dumped memory usage report: {"default": …, "vmem": …}; "default" is HBM."""
    return {m[1]: int(m[2]) for m in re.finditer(r"Memory Space: (\S+)[^\n]*\nTotal bytes: (\d+)", text)}


def _dumped(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path] | None:
    programs = sorted(folder.glob("*.after_optimizations.txt"), key=lambda p: p.stat().st_size)
    reports = sorted(folder.glob("*.after_optimizations-memory-usage-report.txt"), key=lambda p: p.stat().st_size)
    return (programs[-1], reports[-1]) if programs and reports else None


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _first_line(message: str) -> str:
    """The telling line of a compiler error."""
    lines = [" ".join(line.split()) for line in message.splitlines() if line.strip()]
    return (lines[0] if lines else "no reason given")[:300]


def failure_line(returncode: int, log: str) -> str:
    """One line for a child that ended without a result: a signal with the check that failed, or the last line of its traceback."""
    lines = [" ".join(line.split()) for line in log.splitlines() if line.strip()]
    checks = [line[line.index("Check failed") :] for line in lines if "Check failed" in line]
    if returncode < 0:
        name = signal.Signals(-returncode).name
        detail = checks[0] if checks else "no check was named" if name == "SIGABRT" else "out of memory on this machine?" if name == "SIGKILL" else ""
        return f"the TPU compiler ended with {name} ({detail[:200]}); change mesh.* or model.remat"
    return f"the compiling process failed: {lines[-1][:300] if lines else f'exit code {returncode}'}"


def _watch(process, folder: pathlib.Path, full: bool, limit: float) -> bool:
    """Waits for the process; in fast mode only until both dumps are there and no longer grow. False when the time is up."""
    began, sizes = time.monotonic(), None
    while time.monotonic() - began < limit:
        try:
            process.wait(0.5)
            return True
        except subprocess.TimeoutExpired:
            found = None if full else _dumped(folder / "dump")
        now = tuple(p.stat().st_size for p in found) if found else None
        if now and min(now) > 0 and now == sizes:
            return True
        sizes = now
    return False


def compile_step(config, topology: str, step: str, *, full: bool = False, options: dict | None = None, limit: float = 3600.0) -> Outcome:
    """Compiles a step (`child.compile_request`) in a process of its own.

    options: compiler options; limit: seconds. Raises `UserError` for what the child calls the user's mistake, and when the time is up.
    """
    require_compiler()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="mila_plan_"))
    try:
        (folder / "dump").mkdir()
        options = dict(options or {}) | ({} if full else {"xla_dump_to": str(folder / "dump")})
        (folder / "request.json").write_text(json.dumps({"config": config.to_json(), "topology": topology, "step": step, "options": options}))
        began = time.monotonic()
        with open(folder / "log", "w") as log:
            command = [sys.executable, "-m", "mila_jax.parallel.aot.child", str(folder / "request.json")]
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(), cwd=folder, start_new_session=True)
            try:
                in_time = _watch(process, folder, full, limit)
                returncode = process.poll()
            finally:
                _end(process)
        if not in_time:
            raise UserError(f"compiling for {topology} took longer than {limit / 60:.0f} minutes; give more with --minutes")
        return _collect(folder, returncode, full, time.monotonic() - began)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _collect(folder: pathlib.Path, returncode: int | None, full: bool, seconds: float) -> Outcome:
    """What lies in the folder of a child that has ended (returncode None: it was ended in fast mode)."""

    def read(name):
        path = folder / name
        return json.loads(path.read_text()) if path.exists() else None

    lowered, compiled, failed = read("lowered.json"), read("compiled.json"), read("failed.json")
    arguments = lowered["argument_bytes"] if lowered else None
    if failed and failed["kind"] == "user":
        raise UserError(failed["message"])
    dumped = _dumped(folder / "dump")
    memory = {}
    if dumped:
        memory = {"peak": memory_report(dumped[1].read_text()).get("default", 0), "source": "buffer report: sum of the heap, fragments included"}
    if failed:
        return Outcome(None, memory, _first_line(failed["message"]), seconds, arguments)
    if dumped and not full and returncode in (None, 0):  # the same source whether or not the child finished before it was ended
        return Outcome(dumped[0].read_text(), memory, None, seconds, arguments)
    if compiled:
        memory = compiled["memory"] | {"source": "peak_memory_in_bytes of the compiled program"}
        return Outcome((folder / "compiled.txt").read_text(), memory, None, seconds, arguments)
    line = failure_line(returncode or 0, (folder / "log").read_text(errors="replace"))
    return Outcome(None, memory, line, seconds, arguments, passing=returncode != -signal.SIGABRT)  # the compiler's own checks abort
