"""Several processes as one program: start-up, the check that all of them run the same thing, and small exchanges between them.

A TPU pod slice runs one process on each of its machines. They meet at a coordinator, once, before anything touches a device.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import urllib.request

import jax
import numpy as np
from jax.experimental import multihost_utils

from mila_jax.errors import UserError
from mila_jax.runtime import tpu_present

# For machines other than TPUs and clusters that JAX knows by itself, and for tests.
COORDINATOR, PROCESS, PROCESSES = "MILA_COORDINATOR", "MILA_PROCESS_ID", "MILA_PROCESS_COUNT"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands: number `process` of `processes`, `local` of all `devices` are its own."""

    process: int
    processes: int
    local: int
    devices: int

    def __str__(self):
        return f"process {self.process + 1} of {self.processes}: {self.local} of {self.devices} devices ({jax.devices()[0].device_kind})"


def _workers() -> int:
    """Machines of the TPU slices that this one belongs to, as its environment (GKE) or its cloud (TPU VMs) says; 1 elsewhere."""
    names = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if not names and tpu_present():
        names = _metadata("worker-network-endpoints")
    slices = os.environ.get("MEGASCALE_NUM_SLICES", "1")
    return max(1, len([name for name in names.split(",") if name.strip()])) * (int(slices) if slices.isdigit() else 1)


def _metadata(attribute: str) -> str:
    """What a Google Cloud machine is told about itself; "" where nobody answers (Colab, other clouds)."""
    url = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{attribute}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=3) as answer:
            return answer.read().decode()
    except (OSError, ValueError):
        return ""


def _explicit() -> dict | None:
    """Arguments of `jax.distributed.initialize` from MILA_COORDINATOR and its companions, None if they are not set."""
    given = {name: os.environ.get(name) for name in (COORDINATOR, PROCESS, PROCESSES)}
    if not any(given.values()):
        return None
    missing = [name for name, value in given.items() if not value]
    if missing:
        raise UserError(f"{', '.join(n for n in given if n not in missing)} set without {', '.join(missing)}; set all three or none")
    try:
        process, processes = int(given[PROCESS]), int(given[PROCESSES])
    except ValueError:
        raise UserError(f"{PROCESS}={given[PROCESS]} and {PROCESSES}={given[PROCESSES]} must be whole numbers") from None
    if not 0 <= process < processes:
        raise UserError(f"{PROCESS}={process} must lie between 0 and {PROCESSES} - 1 = {processes - 1}")
    return dict(coordinator_address=given[COORDINATOR], process_id=process, num_processes=processes)


def start(initialize: str = "auto", *, timeout: int = 300, shutdown: int = 60) -> None:
    """Joins the other processes if there are any; to be called before JAX touches a device. Twice does nothing.

    initialize: the config's `distributed.initialize`. `auto`: when MILA_COORDINATOR, MILA_PROCESS_ID and MILA_PROCESS_COUNT are set, or
    on one of several machines of a TPU slice; `always`: also where only JAX can find out (Slurm, GKE); `never`. timeout: seconds to
    wait for the others here; shutdown: at the end, where JAX lets none go before all are done and kills those that are left when time is up.
    Raises `UserError` when they do not come, or when this machine is one of several but found itself alone.
    """
    if initialize not in ("auto", "never", "always"):
        raise UserError(f"distributed.initialize={initialize!r} is unknown; use auto, always or never")
    explicit = _explicit()
    if initialize == "never" or jax.distributed.is_initialized() or (initialize == "auto" and explicit is None and _workers() == 1):
        return
    try:
        jax.distributed.initialize(**(explicit or {}), initialization_timeout=timeout, shutdown_timeout_seconds=shutdown)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the processes did not find each other ({reason}); start the same command on every machine, or set distributed.initialize=never"
        ) from None
    if explicit is None and _workers() > 1 and jax.process_count() == 1:
        raise UserError(f"this is one of {_workers()} machines of a slice, but runs alone; start the same command on all of them")


def place() -> Place:
    """Where this process stands. Touches the devices."""
    return Place(jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count())


def first() -> bool:
    """Whether this process is the one that writes what there is only one of."""
    return jax.process_index() == 0


def code_version() -> str:
    """Hash of every source file of the package and of the data pipeline: equal code, equal version."""
    root, digest = pathlib.Path(__file__).parents[2], hashlib.sha256()
    for folder in ("mila_jax", "data_pipeline"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def check_same(named: dict[str, str]) -> None:
    """One collective in which every process shows what it runs (name → text). Raises `UserError` on all of them, naming what differs and
    where, if they are not the same. With one process nothing happens."""
    if jax.process_count() == 1:
        return
    hashes = np.stack([np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.uint32) for text in named.values()])
    everyone = np.asarray(multihost_utils.process_allgather(hashes))  # [process, name, 2]
    odd = {name: np.flatnonzero((everyone[:, i] != everyone[0, i]).any(-1)) for i, name in enumerate(named)}
    wrong = [f"{name} (process {', '.join(str(p + 1) for p in who)} against process 1)" for name, who in odd.items() if len(who)]
    if wrong:
        raise UserError(f"the processes do not run the same thing: {'; '.join(wrong)} differ; give every machine the same command and code")


# What is exchanged goes through the devices: a transfer that is meant, also where training forbids those that nobody meant.
_exchange = functools.partial(jax.transfer_guard, "allow")


def agree(value: float) -> float:
    """The value that process 0 has, on all of them: for decisions that depend on a clock or a file."""
    if jax.process_count() == 1:
        return value
    with _exchange():
        return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def everyone(value: float) -> list[float]:
    """The values that the processes have, by process, on all of them."""
    if jax.process_count() == 1:
        return [value]
    with _exchange():
        return np.asarray(multihost_utils.process_allgather(np.float32(value))).reshape(-1).tolist()


def share(content: bytes | None) -> bytes:
    """The bytes that process 0 has, on all of them; what the others pass is not looked at."""
    if jax.process_count() == 1:
        return content
    with _exchange():
        length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content) if first() else 0)))
        sent = np.frombuffer(content, np.uint8) if first() else np.zeros(length, np.uint8)
        return np.asarray(multihost_utils.broadcast_one_to_all(sent)).astype(np.uint8).tobytes()


def from_first(what: str, function) -> bytes:
    """The bytes that `function` returns on process 0, where alone it runs, on all of them. Its `UserError` or `OSError` ends all of them."""
    made = []
    on_first(what, lambda: made.append(function()))
    return share(made[0] if made else None)


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        with _exchange():
            multihost_utils.sync_global_devices(name)


def on_first(what: str, function) -> None:
    """Runs `function` on process 0 alone; the others wait for it. Its `UserError` or `OSError` ends all of them."""
    failure = None
    if first():
        try:
            function()
        except (UserError, OSError) as error:
            failure = error
    failed = agree(float(failure is not None)) > 0
    if failure is not None:
        raise failure
    if failed:
        raise UserError(f"process 1 could not {what}; its own message says why")
