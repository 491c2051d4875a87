"""Start-up of several processes: what is asked for, and what is refused. Real processes: tests/test_several_processes.py."""

import jax
import pytest

from mila_jax import cli
from mila_jax.errors import UserError
from mila_jax.parallel import distributed
from mila_jax.parallel.mesh import batch_sharding, make_mesh, own_rows


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: made.append(options))
    monkeypatch.setattr(distributed, "tpu_present", lambda: False)
    for name in (distributed.COORDINATOR, distributed.PROCESS, distributed.PROCESSES, "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    return made


def explicit(monkeypatch, process="1", processes="2"):
    monkeypatch.setenv(distributed.COORDINATOR, "host:1")
    monkeypatch.setenv(distributed.PROCESS, process)
    monkeypatch.setenv(distributed.PROCESSES, processes)


def test_one_machine_meets_nobody(calls, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    distributed.start()
    distributed.start("never")
    assert calls == []


def test_variables_name_the_place(calls, monkeypatch):
    explicit(monkeypatch)
    distributed.start("never")
    assert calls == []
    distributed.start(timeout=7, shutdown=9)
    assert calls == [dict(coordinator_address="host:1", process_id=1, num_processes=2, initialization_timeout=7, shutdown_timeout_seconds=9)]


def test_parts_of_an_encoding_job_wait_for_each_other_for_hours(calls, monkeypatch):
    """JAX lets no process end before the others, and kills those that are still at work when its time is up."""
    explicit(monkeypatch)
    monkeypatch.setattr("mila_jax.prepare.prepare", lambda *args, **kwargs: [])
    assert cli.main(["prepare", "--quiet"]) == 0
    assert [call["shutdown_timeout_seconds"] for call in calls] == [24 * 3600]


def test_a_pod_worker_that_finds_itself_alone_ends(calls, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
    with pytest.raises(UserError, match="one of 4 machines of a slice, but runs alone"):
        distributed.start()
    assert calls == [dict(initialization_timeout=300, shutdown_timeout_seconds=60)]


def test_a_tpu_vm_asks_its_cloud(calls, monkeypatch):
    monkeypatch.setattr(distributed, "_metadata", {"worker-network-endpoints": "a:1:10.0.0.2,b:1:10.0.0.3"}.get)
    distributed.start()
    assert calls == []  # no TPU here
    monkeypatch.setattr(distributed, "tpu_present", lambda: True)
    with pytest.raises(UserError, match="one of 2 machines"):
        distributed.start()
    monkeypatch.setattr(distributed, "_metadata", lambda attribute: "")
    distributed.start()
    assert len(calls) == 1
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    with pytest.raises(UserError, match="one of 2 machines"):
        distributed.start()


@pytest.mark.parametrize(
    "process, processes, match", [("2", "2", "between 0 and"), ("x", "2", "whole numbers"), ("", "2", "without MILA_PROCESS_ID")]
)
def test_bad_variables(calls, monkeypatch, process, processes, match):
    explicit(monkeypatch, process, processes)
    with pytest.raises(UserError, match=match):
        distributed.start()


def test_processes_that_do_not_come(calls, monkeypatch):
    def nobody(**options):
        raise RuntimeError("DEADLINE_EXCEEDED: barrier timed out")

    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    explicit(monkeypatch)
    with pytest.raises(UserError, match="did not find each other .*DEADLINE_EXCEEDED"):
        distributed.start()
    with pytest.raises(UserError, match="distributed.initialize='maybe'"):
        distributed.start("maybe")


def test_one_process_shares_with_itself():
    distributed.check_same({"config": "a"})
    assert distributed.share(b"abc") == b"abc" and distributed.agree(2.0) == 2.0
    ran = []
    distributed.on_first("run", lambda: ran.append(1))
    assert ran == [1] and len(distributed.code_version()) == 16


def test_rows_of_a_process_that_has_all_devices():
    mesh = make_mesh(dict(data=-1, fsdp=1, context=1, tensor=1))
    assert own_rows(batch_sharding(mesh), 4 * mesh.size) == list(range(4 * mesh.size))
