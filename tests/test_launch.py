"""Launchers for TPUs: what they would run (--dry-run), and that they wait, restart and end as they should in a small cloud of their own."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest

from mila_jax.config import load_config
from mila_jax.parallel.aot.sizes import plan_sizes

ROOT = pathlib.Path(__file__).parents[1]
FAKE = pathlib.Path(__file__).with_name("fake_cloud.py")
LAUNCHERS = ("tpu_vm.sh", "tpu_pod.sh", "tpu_multislice.sh")
SHARED = ("tpu_common.sh", "tpu_workers.sh", "tpu_worker.sh")

# Stands for scripts/setup.sh on a worker: a .venv whose python is the `mila` below.
SETUP = """#!/bin/bash
[ "$1" = --which-python ] && exit "${NO_PYTHON:-0}"
root="$(cd "$(dirname "$0")/.." && pwd)"
echo "$* PYTHON=${PYTHON:-}" >> "$HOME/setups"
mkdir -p "$root/.venv/bin"
cp "$root/scripts/mila.sh" "$root/.venv/bin/python"
"""

# Stands for `python -m mila_jax`: each attempt takes its exit code from the first line of $HOME/../codes.WORKER (none left: 0);
# "wait" works until SIGTERM, then leaves with 75 as `mila train` does. And for `python -m pip`.
MILA = """#!/bin/bash
[ "$2" = pip ] && exit "${NO_PIP:-0}"
printf '%s\\n' "$@" >> "$HOME/arguments"
codes="$HOME/../../codes.$(basename "$HOME")"
code="$(head -n 1 "$codes" 2>/dev/null)"
[ -f "$codes" ] && sed -i 1d "$codes"
if [ "$code" = wait ]; then trap 'echo saved >> "$HOME/attempts"; exit 75' TERM; fi  # before anybody can know that it is there
echo "mila attempts with ${code:-0}" | tee -a "$HOME/attempts"
if [ "$code" = wait ]; then
  while :; do sleep 0.02; done
fi
exit "${code:-0}"
"""


def write_tool(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def git(root, *arguments):
    done = subprocess.run(["git", "-C", root, "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A git checkout with the launchers, in a folder with a space in its name; a worker's setup and `mila` are stand-ins."""
    root = tmp_path_factory.mktemp("launch") / "a repository"
    (root / "scripts").mkdir(parents=True)
    for name in LAUNCHERS + SHARED:
        shutil.copy(ROOT / "scripts" / name, root / "scripts" / name)
    write_tool(root / "scripts" / "setup.sh", SETUP)
    write_tool(root / "scripts" / "mila.sh", MILA)
    (root / ".gitignore").write_text("runs/\n.venv/\n")
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message=all")
    return root


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """A folder with the tools that the launchers need and nothing else: no gcloud, no xpk."""
    folder = tmp_path_factory.mktemp("tools")
    names = "bash basename dirname git sed grep head tail mkdir date cat tar gzip tr xargs rm mv cp touch sleep flock setsid nohup tee env true"
    for name in names.split():
        (folder / name).symlink_to(shutil.which(name))
    return folder


def launch(root, script, *arguments, path, timeout=60, **environment):
    environment = {"PATH": str(path), "HOME": "/nonexistent", "MILA_RETRY_SECONDS": "0", **environment}
    command = ["bash", root / "scripts" / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=timeout)


def parts(line):
    """A command as (words in order, set of flags): the order of flags means nothing."""
    words = shlex.split(line)
    return [w for w in words if not w.startswith("--")], {w for w in words if w.startswith("--")}


def check(done, root, expected):
    """A dry run printed exactly the `expected` commands; {root} and {commit} are filled in, several spaces are one."""
    assert done.returncode == 0, done.stderr
    commit = git(root, "rev-parse", "--short=12", "HEAD")
    expected = [line.strip().replace("{root}", str(root)).replace("{commit}", commit) for line in expected.strip().splitlines()]
    printed = done.stdout.splitlines()
    assert len(printed) == len(expected), done.stdout
    for got, wanted in zip(printed, expected, strict=True):
        assert parts(got) == parts(wanted)


COPY = """
mkdir -p '{root}/runs/launcher'
git -C '{root}' archive {commit} --format=tar.gz --prefix=mila_jax/ '--output={root}/runs/launcher/mila_jax-{commit}.tar.gz'
gcloud compute tpus tpu-vm scp '{root}/scripts/tpu_worker.sh' '{root}/runs/launcher/mila_jax-{commit}.tar.gz' NAME: PLACE --worker=WORKERS
"""


def copy(name, place, workers):
    return COPY.strip().replace("NAME", name).replace("PLACE", place).replace("WORKERS", workers)


def test_dry_run_of_a_vm(repository, tools):
    place = "--project=p1 --zone=us-west4-a"
    done = launch(
        repository, "tpu_vm.sh", "run", "vm1", "--type=v5litepod-8", "--project=p1", "--zone", "us-west4-a", "--dry-run", "--spot", "--tries=2",
        "--create-flag=--network=net 1", "--", "mila", "train", "--config=configs/tiny.py", path=tools,
    )  # fmt: skip
    check(done, repository, f"""
        gcloud compute tpus tpu-vm describe vm1 {place} '--format=value(state)'
        gcloud compute tpus tpu-vm create vm1 {place} --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite --spot '--network=net 1'
        {copy("vm1", place, "0")}
        gcloud compute tpus tpu-vm ssh vm1 {place} --worker=0 '--command=bash tpu_worker.sh setup --extra=tpu --extra=gcs mila_jax-{{commit}}.tar.gz'
        gcloud compute tpus tpu-vm ssh vm1 {place} --worker=0 '--command=bash tpu_worker.sh start --tries=2 -- train --config=configs/tiny.py'
        gcloud compute tpus tpu-vm ssh vm1 {place} --worker=0 '--command=bash tpu_worker.sh logs --lines=40 --follow'
        gcloud compute tpus tpu-vm ssh vm1 {place} --worker=0 '--command=bash tpu_worker.sh status'
    """)  # fmt: skip


@pytest.mark.parametrize("file", ["README.md", "scripts/tpu_vm.sh", "scripts/tpu_pod.sh", "scripts/tpu_multislice.sh"])
def test_documented_commands_fit_the_chips_of_their_types(file):
    """Types of v4 and v5p count cores, two a chip; the others count chips."""
    text = re.sub(r"\\\n#?", " ", (ROOT / file).read_text())
    found = re.findall(r"--type=(\w+)-(\d+)(?: --slices=(\d+))?[^\n]*? -- (train [^\n]*)", text)
    assert found
    for kind, number, slices, command in found:
        chips = int(number) // (2 if kind in ("v4", "v5p") else 1) * int(slices or 1)
        config = load_config(re.search(r"--config=(\S+)", command)[1], re.findall(r"--config\.\S+", command))
        plan_sizes(config, chips, "train")


def test_dry_run_of_a_pod(repository, tools):
    place = "--project=PROJECT --zone=ZONE"  # known to nobody here
    train = "train --config=configs/xl128.py --config.data.dir=gs://b/l --config.train.dir=gs://b/r"
    done = launch(repository, "tpu_pod.sh", "run", "pod-1", "--type=v5p-64", "--spot", "--dry-run", "--", *train.split(), path=tools)
    check(done, repository, f"""
        gcloud compute tpus queued-resources describe pod-1 {place} '--format=value(state.state)'
        gcloud compute tpus queued-resources create pod-1 --node-id=pod-1 {place} --accelerator-type=v5p-64 --runtime-version=v2-alpha-tpuv5 --spot
        gcloud compute tpus queued-resources describe pod-1 {place} '--format=value(state.state)'
        {copy("pod-1", place, "all")}
        gcloud compute tpus tpu-vm ssh pod-1 {place} --worker=all \
            '--command=bash tpu_worker.sh setup --extra=tpu --extra=gcs mila_jax-{{commit}}.tar.gz'
        gcloud compute tpus tpu-vm ssh pod-1 {place} --worker=all \
            '--command=bash tpu_worker.sh start --tries=5 -- {train} --config.distributed.initialize=always'
        gcloud compute tpus queued-resources describe pod-1 {place} '--format=value(state.state)'
        gcloud compute tpus tpu-vm ssh pod-1 {place} --worker=all \
            '--command=if [ -f tpu_worker.sh ]; then bash tpu_worker.sh status; else echo mila-worker new none; fi'
    """)  # fmt: skip
    assert f"queued-resources delete pod-1 {place} --force --quiet" in done.stderr


def test_dry_run_of_several_slices(repository, tools):
    place = "--cluster=c1 --project=p1 --zone=us-east5-a"
    common = "--restart-on-exit-codes=75 --max-restarts=100 --termination-grace-period-seconds=300"
    place_flags = [*place.split(), "--type=v5p-256", "--dry-run"]
    train = "train --config.train.dir=gs://b/r --config.distributed.initialize=auto"
    done = launch(repository, "tpu_multislice.sh", "create", "w1", *place_flags, "--slices=4", "--tries=3", "--", *train.split(), path=tools)
    folder = "{root}/runs/launcher/mila_jax-{commit}"
    check(done, repository, f"""
        mkdir -p '{folder}'
        git -C '{{root}}' archive {{commit}} --format=tar '--output={folder}.tar'
        tar -xf '{folder}.tar' -C '{folder}'
        xpk workload create {place} --workload=w1 --tpu-type=v5p-256 --num-slices=4 {common} --base-docker-image=python:3.12 '--script-dir={folder}' \
            '--command=exec bash scripts/tpu_worker.sh run --tries=3 --extra=tpu --extra=gcs -- {train}'
    """)  # fmt: skip
    image = ("--image=us-docker.pkg.dev/p1/r/mila:1", "--create-flag=--priority=high", "--spot", "--restarts=7", "--grace=60")
    done = launch(repository, "tpu_multislice.sh", "create", "w1", *place_flags, *image, "--", "train", path=tools)
    check(done, repository, f"""
        xpk workload create {place} --workload=w1 --tpu-type=v5p-256 --num-slices=1 --restart-on-exit-codes=75 --max-restarts=7 \
            --termination-grace-period-seconds=60 --docker-image=us-docker.pkg.dev/p1/r/mila:1 --priority=high --spot \
            '--command=exec bash scripts/tpu_worker.sh run --tries=5 --python=python3 -- train --config.distributed.initialize=always'
    """)  # fmt: skip


VM = "gcloud compute tpus tpu-vm"
QUEUED = "gcloud compute tpus queued-resources"
PLACE = "--project=p --zone=z"
ANSWERS = [
    ("tpu_vm.sh create n --type=v6e-8", f"{VM} create n {PLACE} --accelerator-type=v6e-8 --version=v2-alpha-tpuv6e"),
    ("tpu_vm.sh create n --type=v4-8 --runtime=r", f"{VM} create n {PLACE} --accelerator-type=v4-8 --version=r"),
    ("tpu_vm.sh stop n", f"{VM} ssh n {PLACE} --worker=0 '--command=if [ -f tpu_worker.sh ]; then bash tpu_worker.sh stop; fi'"),
    ("tpu_vm.sh logs n --lines=5", f"{VM} ssh n {PLACE} --worker=0 '--command=bash tpu_worker.sh logs --lines=5'"),
    ("tpu_vm.sh fetch n --to=/tmp/x --from=runs/demo", f"mkdir -p /tmp/x\n{VM} scp n:mila_jax/runs/demo /tmp/x {PLACE} --worker=0 --recurse"),
    ("tpu_vm.sh delete n", f"{VM} delete n {PLACE} --quiet"),
    ("tpu_pod.sh wait n", f"{QUEUED} describe n {PLACE} '--format=value(state.state)'"),
    ("tpu_pod.sh create n --type=v4-32", f"{QUEUED} create n --node-id=n {PLACE} --accelerator-type=v4-32 --runtime-version=tpu-ubuntu2204-base"),
    ("tpu_pod.sh logs n --worker=3 --follow", f"{VM} ssh n {PLACE} --worker=3 '--command=bash tpu_worker.sh logs --lines=40 --follow'"),
    ("tpu_pod.sh stop n --ssh-flag=--internal-ip",
     f"{VM} ssh n {PLACE} --worker=all --internal-ip '--command=if [ -f tpu_worker.sh ]; then bash tpu_worker.sh stop; fi'"),
    ("tpu_pod.sh fetch n --from=/mnt/x --to=y", f"mkdir -p y\n{VM} scp n:/mnt/x y {PLACE} --worker=0 --recurse"),
    ("tpu_pod.sh delete n", f"{QUEUED} delete n {PLACE} --force --quiet"),
    ("tpu_multislice.sh wait n --cluster=c", f"xpk workload list --cluster=c {PLACE} --wait-for-job-completion=n"),
    ("tpu_multislice.sh list --cluster=c", f"xpk workload list --cluster=c {PLACE}"),
    ("tpu_multislice.sh list n --cluster=c", f"xpk workload list --cluster=c {PLACE} --filter-by-job=n"),
    ("tpu_multislice.sh delete n --cluster=c", f"xpk workload delete --cluster=c {PLACE} --workload=n"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "expected"), ANSWERS, ids=[a[0] for a in ANSWERS])
def test_dry_run_of_the_small_commands(asked, expected, repository, tools):
    environment = {"CLOUDSDK_CORE_PROJECT": "p", "CLOUDSDK_COMPUTE_ZONE": "z"}
    check(launch(repository, *asked.split(), "--dry-run", path=tools, **environment), repository, expected)


def test_what_is_strange_stays_quoted_through_both_shells(repository, tools):
    arguments = ["generate", '--text=it\'s "wet" $HOME; rm *', "--out=my runs/a\tb", "", "--frames=ü"]
    for script, type_ in (("tpu_vm.sh", "v6e-1"), ("tpu_pod.sh", "v6e-8")):
        done = launch(repository, script, "start", "n", f"--type={type_}", "--dry-run", "--", *arguments, path=tools)
        command = next(w for w in shlex.split(done.stdout) if w.startswith("--command=")).removeprefix("--command=")
        assert shlex.split(command) == ["bash", "tpu_worker.sh", "start", "--tries=5", "--", *arguments]
    done = launch(repository, "tpu_multislice.sh", "create", "n", "--cluster=c", "--type=t", "--image=i", "--dry-run", "--", *arguments, path=tools)
    command = next(w for w in shlex.split(done.stdout) if w.startswith("--command=")).removeprefix("--command=exec ")
    assert shlex.split(command)[-len(arguments) :] == arguments
    done = launch(repository, "tpu_vm.sh", "fetch", "n", "--to=it's here", "--dry-run", path=tools)
    assert shlex.split(done.stdout.splitlines()[0]) == ["mkdir", "-p", "it's here"]


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_a_pod_takes_what_its_workers_do_together(command, repository, tools):
    done = launch(repository, "tpu_pod.sh", "start", "n", "--type=v6e-16", "--dry-run", "--", command, "--config.train.dir=gs://b/r", path=tools)
    assert done.returncode == 0 and f"start --tries=5 -- {command} " in done.stdout, done.stderr


MISTAKES = [
    ("tpu_vm.sh", ["fly", "n"], "unknown command 'fly'"),
    ("tpu_vm.sh", ["run"], "run needs the name of the VM"),
    ("tpu_vm.sh", ["run", "My VM", "--", "demo"], "name 'My VM'"),
    ("tpu_vm.sh", ["run", "n", "--type=v6e-8"], "no mila command"),
    ("tpu_vm.sh", ["create", "n"], "no TPU type"),
    ("tpu_vm.sh", ["create", "n", "--type=v5p-64"], "several workers; use scripts/tpu_pod.sh"),
    ("tpu_vm.sh", ["create", "n", "--type=h100-8"], "unknown TPU type 'h100-8'"),
    ("tpu_vm.sh", ["run", "n", "--typ=v6e-8", "--", "demo"], "unknown option --typ"),
    ("tpu_vm.sh", ["run", "n", "--type"], "--type needs a value"),
    ("tpu_vm.sh", ["run", "n", "train"], "unexpected argument 'train'; the mila command comes after --"),
    ("tpu_vm.sh", ["run", "n", "--tries=many", "--", "demo"], "--tries takes a number"),
    ("tpu_vm.sh", ["fetch", "n", "--from=gs://b/r"], "gcloud storage cp --recursive gs://b/r"),
    ("tpu_vm.sh", ["run", "n", "--cluster=c", "--", "demo"], "unknown option --cluster"),
    ("tpu_pod.sh", ["run", "n", "--type=tpu7x-128", "--", "train"], "use scripts/tpu_multislice.sh"),
    ("tpu_pod.sh", ["run", "n", "--type=v5p-64", "--poll=soon", "--", "train"], "--poll takes seconds"),
    ("tpu_pod.sh", ["run", "n", "--type=v6e-16", "--", "generate", "--out=o"], "mila generate is for one worker, only train and prepare"),
    ("tpu_pod.sh", ["watch", "n", "--type=v5p-16", "--", "mila", "evaluate"], "use scripts/tpu_vm.sh"),
    ("tpu_pod.sh", ["start", "n", "--", "demo"], "use scripts/tpu_vm.sh, or pass a --type with one worker"),
    ("tpu_pod.sh", ["logs", "n", "--worker=all"], "--worker takes a number"),
    ("tpu_multislice.sh", ["create", "w", "--type=v5p-256", "--", "train"], "no cluster"),
    ("tpu_multislice.sh", ["create", "w", "--cluster=c", "--", "train"], "no TPU type"),
    ("tpu_multislice.sh", ["create", "w", "--cluster=c", "--type=t", "--slices=0", "--", "train"], "--slices takes a number"),
    ("tpu_multislice.sh", ["create", "w", "--cluster=c", "--type=t", "--image=i", "--base-image=j", "--", "train"], "cannot go together"),
    ("tpu_multislice.sh", ["create", "w", "--cluster=c", "--type=t", "--", "generate", "--text=a\nb"], "one line only"),
    ("tpu_multislice.sh", ["create", "w", "--cluster=c", "--type=v6e-8", "--slices=2", "--", "generate", "--out=o"], "mila generate is for one worker"),
    ("tpu_multislice.sh", ["create", "w", "--cluster=c", "--type=v5p-16", "--", "demo"], "pass --slices=1 and a --type with one worker"),
    ("tpu_multislice.sh", ["delete", "--cluster=c"], "delete needs the name"),
]


@pytest.mark.parametrize(("script", "arguments", "message"), MISTAKES, ids=lambda v: v if isinstance(v, str) else " ".join(v).replace("\n", " "))
def test_mistakes_end_in_one_line(script, arguments, message, repository, tools):
    for extra in ([], ["--dry-run"]):
        done = launch(repository, script, *arguments[:1], *extra, *arguments[1:], path=tools)
        assert done.returncode == 2 and done.stdout == ""
        lines = [line for line in done.stderr.splitlines() if not line.startswith(f"{script}: warning: config.train.dir")]
        assert len(lines) == 1 and lines[0].startswith(f"error: {script}: ") and message in lines[0]


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_is_the_head_of_the_script(script, repository, tools):
    done = launch(repository, script, "--help", path=tools)
    assert done.returncode == 0 and "--dry-run" in done.stdout and "#" not in done.stdout and "shellcheck" not in done.stdout
    options = set(re.findall(r"^ +(--[a-z-]+)\)", "".join((ROOT / "scripts" / s).read_text() for s in (script, "tpu_common.sh")), re.MULTILINE))
    assert options and all(option in done.stdout for option in options)
    done = launch(repository, script, path=tools)
    assert done.returncode == 2 and done.stdout == "" and "--dry-run" in done.stderr


def test_what_is_missing_is_named(repository, tools, tmp_path):
    done = launch(repository, "tpu_vm.sh", "delete", "n", "--project=p", "--zone=z", path=tools)
    assert done.returncode == 2 and "gcloud is not installed" in done.stderr and len(done.stderr.splitlines()) == 1
    done = launch(repository, "tpu_multislice.sh", "delete", "n", "--cluster=c", "--project=p", "--zone=z", path=tools)
    assert done.returncode == 2 and "xpk is not installed (pip install xpk)" in done.stderr and len(done.stderr.splitlines()) == 1
    shutil.copytree(repository / "scripts", tmp_path / "plain" / "scripts")
    done = launch(tmp_path / "plain", "tpu_vm.sh", "run", "n", "--type=v6e-1", "--", "demo", path=tools)
    assert done.returncode == 2 and "is no git checkout" in done.stderr


class Cloud:
    """The cloud of fake_cloud.py in a folder, and the launchers of `repository` on top of it."""

    def __init__(self, folder, repository, tools):
        self.folder, self.repository = folder, repository
        for name in ("gcloud", "xpk"):
            write_tool(folder / "bin" / name, f"#!{sys.executable} -IS\n" + FAKE.read_text())
        self.path = f"{folder / 'bin'}:{tools}"
        self.save("config", {"core/project": "from-config", "compute/zone": "zone-from-config"})

    def save(self, name, value):
        (self.folder / f"{name}.json").write_text(json.dumps(value))

    def codes(self, worker, *codes):
        (self.folder / f"codes.{worker}").write_text("".join(f"{c}\n" for c in codes))

    def launch(self, script, *arguments, **environment):
        return launch(self.repository, script, *arguments, path=self.path, FAKE_CLOUD=str(self.folder), **environment)

    def verbs(self, tool="gcloud"):
        calls = [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]
        calls = [[a for a in c if not a.startswith("--")] + [a for a in c if a.startswith("--command=")] for c in calls if c[0] == tool]
        return [" ".join(c[3:] if c[1] == "compute" else c[1:]) for c in calls]

    def end(self):
        for pid in self.folder.glob("workers/*/mila_jax/runs/launcher/pid"):
            try:
                os.killpg(int(pid.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                pass


@pytest.fixture
def cloud(tmp_path, repository, tools):
    cloud = Cloud(tmp_path, repository, tools)
    yield cloud
    cloud.end()


def changes(cloud):
    """The calls in order, without those that only look."""
    verbs = [v.split(" --command=")[-1].split(" -- ")[0] if "--command=" in v else " ".join(v.split()[:3]) for v in cloud.verbs()]
    return [re.sub(r"mila_jax-\w+", "ARCHIVE", v) for v in verbs if "describe" not in v and "status" not in v and "get-value" not in v]


def test_pod_comes_back_after_it_was_taken_away(cloud):
    """Queued → ACTIVE → taken away while it trains → FAILED when asked for again → ACTIVE → done on both workers."""
    cloud.save("workers", 2)
    taken_away = ["WAITING_FOR_RESOURCES", "PROVISIONING", *["ACTIVE"] * 3, "SUSPENDING", "SUSPENDED"]
    cloud.save("lives", [taken_away, ["WAITING_FOR_RESOURCES", "FAILED"], ["ACTIVE"]])
    for worker in (0, 1):
        cloud.codes(worker, "wait", "75", "1", "0")  # the first is killed with its worker
    done = cloud.launch("tpu_pod.sh", "run", "p1", "--type=v6e-16", "--spot", "--poll=0", "--", "train", "--config.train.dir=gs://b/it's one")
    assert done.returncode == 0, done.stderr
    brought_up = ["tpu-vm scp " + str(cloud.repository / "scripts" / "tpu_worker.sh").split()[0]]
    brought_up += ["bash tpu_worker.sh setup --extra=tpu --extra=gcs ARCHIVE.tar.gz", "bash tpu_worker.sh start --tries=5"]
    create, delete = "queued-resources create p1", "queued-resources delete p1"
    assert changes(cloud) == [create, *brought_up, delete, create, delete, create, *brought_up]
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "SUSPENDING", "SUSPENDED", "FAILED"):
        assert f"p1 is {state}" in done.stderr
    assert done.stderr.count("costs money until") == 1 and "every worker is done" in done.stderr
    for worker in (0, 1):
        home = cloud.folder / "workers" / str(worker)
        assert (home / "attempts").read_text().split("\n")[:-1] == [f"mila attempts with {c}" for c in ("75", "1", "0")]
        assert (home / "arguments").read_text().splitlines()[:5] == [
            "-m", "mila_jax", "train", "--config.train.dir=gs://b/it's one", "--config.distributed.initialize=always",
        ]  # fmt: skip
    assert all("--project=from-config" in line and "--zone=zone-from-config" in line
               for line in (cloud.folder / "calls.jsonl").read_text().splitlines() if "get-value" not in line)  # fmt: skip


def test_pod_ends_when_a_worker_fails_for_good(cloud):
    cloud.save("workers", 2)
    cloud.codes(0, "wait")
    cloud.codes(1, "3", "3")
    done = cloud.launch(
        "tpu_pod.sh", "run", "p1", "--type=v6e-16", "--poll=0", "--tries=2", "--delete-at-end", "--", "train", "--config.train.dir=/mnt/run"
    )  # fmt: skip
    assert done.returncode == 1 and "failed: mila-worker w-1 failed 3" in done.stderr
    assert not (cloud.folder / "life.json").exists() and cloud.verbs()[-1].startswith("queued-resources delete")
    assert cloud.verbs()[-2].endswith("tpu_worker.sh stop; fi")


def test_pod_starts_again_on_workers_that_were_restarted(cloud):
    cloud.save("workers", 2)
    for worker in (0, 1):
        cloud.codes(worker, "wait", "0")
    command = ["p1", "--type=v6e-16", "--poll=0", "--", "train", "--config.train.dir=gs://b/r"]
    assert cloud.launch("tpu_pod.sh", "create", *command[:2]).returncode == 0
    for step in ("wait", "setup", "start"):
        assert cloud.launch("tpu_pod.sh", step, *(command if step == "start" else command[:3])).returncode == 0
    status = cloud.launch("tpu_pod.sh", "status", "p1").stdout.splitlines()
    assert status == ["ACTIVE", "mila-worker w-0 running", "mila-worker w-1 running"]
    again = cloud.launch("tpu_pod.sh", "start", *command)
    assert again.returncode != 0 and "a run is going on; stop it first" in again.stderr
    pid = int((cloud.folder / "workers/0/mila_jax/runs/launcher/pid").read_text())
    os.killpg(pid, signal.SIGKILL)  # as when the machine goes down
    done = cloud.launch("tpu_pod.sh", "run", *command)  # finds worker 1 running and watches
    assert done.returncode == 0, done.stderr
    assert "watching it" in done.stderr and "workers were restarted" in done.stderr
    assert (cloud.folder / "workers/1/attempts").read_text().splitlines() == ["mila attempts with wait", "saved", "mila attempts with 0"]
    assert "queued-resources delete" not in " ".join(cloud.verbs())


def test_pod_gives_up_what_it_cannot_get(cloud):
    cloud.save("lives", [["FAILED"]] * 5)
    done = cloud.launch("tpu_pod.sh", "run", "p1", "--type=v6e-16", "--poll=0", "--tries=3", "--", "train", "--config.train.dir=gs://b/r")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: tpu_pod.sh: asked 3 times for p1")
    cloud.save("life", ["UNREACHABLE"])
    done = cloud.launch("tpu_pod.sh", "run", "p1", "--type=v6e-16", "--poll=0", "--", "train", "--config.train.dir=gs://b/r")
    assert done.returncode == 1 and "connection reset" in done.stderr.splitlines()[-1]


def test_vm_runs_follows_and_fetches(cloud, tmp_path):
    cloud.codes(0, "75", "0")
    done = cloud.launch("tpu_vm.sh", "run", "v1", "--type=v5litepod-8", "--zone=z", "--", "train")
    assert done.returncode == 0, done.stderr
    assert "exit code 75" in done.stdout and done.stdout.count("mila attempts with") == 2
    assert cloud.verbs()[:3] == ["config get-value core/project", "tpu-vm describe v1", "tpu-vm create v1"]
    assert "w-0 done" in done.stderr and "tpu_vm.sh delete v1" in done.stderr
    target = tmp_path / "it's here"
    assert cloud.launch("tpu_vm.sh", "fetch", "v1", f"--to={target}", "--from=runs/launcher").returncode == 0
    assert "mila attempts with 75" in (target / "launcher" / "log.txt").read_text()
    cloud.codes(0, "2")
    done = cloud.launch("tpu_vm.sh", "run", "v1", "--tries=1", "--", "train")
    assert done.returncode == 1 and "using v1, which is there already" in done.stderr and "w-0 failed 2" in done.stderr
    cloud.save("life", ["PREEMPTED"])
    done = cloud.launch("tpu_vm.sh", "run", "v1", "--type=v5litepod-8", "--", "demo")
    assert done.returncode == 0 and "was taken away; creating it again" in done.stderr
    assert cloud.launch("tpu_vm.sh", "delete", "v1").returncode == 0 and not (cloud.folder / "workers/0").exists()


def test_changes_that_are_in_no_commit_are_refused(cloud, tmp_path):
    copied = tmp_path / "changed"
    shutil.copytree(cloud.repository, copied)
    (copied / "scripts" / "mila.sh").write_text(MILA + "# changed\n")
    cloud.repository = copied
    done = cloud.launch("tpu_vm.sh", "run", "v1", "--type=v6e-1", "--", "demo")
    assert done.returncode == 2 and "commit them, or pass --ignore-changes" in done.stderr
    assert not (cloud.folder / "calls.jsonl").exists()
    done = cloud.launch("tpu_vm.sh", "run", "v1", "--type=v6e-1", "--dry-run", "--", "demo")
    assert done.returncode == 0 and "warning: changed files" in done.stderr
    done = cloud.launch("tpu_vm.sh", "run", "v1", "--type=v6e-1", "--ignore-changes", "--", "demo")
    assert done.returncode == 0, done.stderr
    assert "# changed" not in (cloud.folder / "workers/0/mila_jax/.venv/bin/python").read_text()


def test_several_slices_go_to_xpk_whose_exit_code_is_passed_on(cloud):
    options = ("--cluster=c", "--type=v5p-256", "--slices=2")
    done = cloud.launch("tpu_multislice.sh", "create", "w1", *options, "--", "train", "--config.train.dir=gs://b/r")
    assert done.returncode == 0, done.stderr
    (call,) = [json.loads(line) for line in (cloud.folder / "calls.jsonl").read_text().splitlines() if line.startswith('["xpk"')]
    assert call[:3] == ["xpk", "workload", "create"] and "--num-slices=2" in call and "--project=from-config" in call
    folder = pathlib.Path(next(a for a in call if a.startswith("--script-dir=")).split("=", 1)[1])
    assert (folder / "scripts" / "tpu_worker.sh").is_file() and not (folder / ".git").exists()
    cloud.save("xpk_code", 125)
    assert cloud.launch("tpu_multislice.sh", "wait", "w1", "--cluster=c").returncode == 125


class Worker:
    """A home folder with a set-up copy of the repository in it, and tpu_worker.sh beside."""

    def __init__(self, folder, repository, tools):
        self.home, self.tools = folder / "workers" / "0", tools
        shutil.copytree(repository, self.home / "mila_jax", ignore=shutil.ignore_patterns(".git", "runs"))
        shutil.copy(repository / "scripts" / "tpu_worker.sh", self.home)
        write_tool(self.home / "mila_jax" / ".venv" / "bin" / "python", MILA)

    def codes(self, *codes):
        (self.home.parents[1] / "codes.0").write_text("".join(f"{c}\n" for c in codes))

    def environment(self, **more):
        return {"PATH": str(self.tools), "HOME": str(self.home), "HOSTNAME": "w", "MILA_RETRY_SECONDS": "0", **more}

    def __call__(self, *arguments, script="tpu_worker.sh", **more):
        command = ["bash", self.home / script, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment(**more), cwd="/", timeout=60)

    @property
    def state(self):
        return self("status").stdout.removeprefix("mila-worker w ").strip()

    @property
    def attempts(self):
        return [line.split()[-1] for line in (self.home / "attempts").read_text().splitlines()]

    def until(self, condition):
        for _ in range(500):
            if condition():
                return
            time.sleep(0.02)
        raise AssertionError((self.home / "mila_jax" / "runs" / "launcher" / "log.txt").read_text())


@pytest.fixture
def worker(tmp_path, repository, tools):
    worker = Worker(tmp_path, repository, tools)
    yield worker
    worker("stop")


def test_worker_starts_again_until_done(worker):
    """75 is no failure: with two tries, 1 75 1 75 0 comes to its end."""
    worker.codes("1", "75", "1", "75", "0")
    assert worker.state == "none"
    assert worker("start", "--tries=2", "--", "train", "--text=a b").returncode == 0
    worker.until(lambda: worker.state == "done")
    assert worker.attempts == ["1", "75", "1", "75", "0"]
    assert (worker.home / "arguments").read_text().splitlines()[:4] == ["-m", "mila_jax", "train", "--text=a b"]
    done = worker("logs", "--lines=2")
    assert done.stdout.splitlines()[0] == "mila attempts with 0" and done.stdout.splitlines()[1].endswith("exit code 0")


def test_worker_gives_up_after_failures_one_after_another(worker):
    worker.codes(*["4"] * 9)
    worker("start", "--tries=3", "--", "train")
    worker.until(lambda: worker.state == "failed 4")
    assert worker.attempts == ["4"] * 3
    assert "giving up" in worker("logs").stdout


def test_worker_stops_after_a_save_and_can_go_on(worker):
    worker.codes("wait", "wait")
    worker("start", "--", "train")
    worker.until(lambda: (worker.home / "attempts").exists())
    refused = worker("start", "--", "train")
    assert refused.returncode == 2 and "a run is going on; stop it first" in refused.stderr
    done = worker("stop")
    assert done.returncode == 0 and done.stdout.strip() == "mila-worker w stopped 75"
    assert worker.attempts == ["wait", "saved"]
    worker("start", "--", "train")
    worker.until(lambda: len(worker.attempts) == 3)
    launcher = worker.home / "mila_jax" / "runs" / "launcher"
    os.kill(int((launcher / "pid").read_text()), signal.SIGTERM)  # by the system, which takes the machine away
    worker.until(lambda: worker.state == "interrupted 75")
    worker.codes("wait")
    worker("start", "--", "train")
    worker.until(lambda: worker.attempts == ["wait", "saved", "wait", "saved", "wait"])
    os.killpg(int((launcher / "pid").read_text()), signal.SIGKILL)
    worker.until(lambda: worker.state == "lost")


def test_worker_can_be_stopped_as_soon_as_it_is_started(worker):
    for _ in range(3):  # whether the signal comes before or after there is a command
        worker.codes("wait")
        worker("start", "--", "train")
        assert worker("stop").stdout.startswith("mila-worker w stopped ")


def test_worker_can_be_stopped_between_two_attempts(worker):
    worker.codes("1")
    command = ["bash", worker.home / "tpu_worker.sh", "start", "--", "train"]
    subprocess.run(command, env=worker.environment(MILA_RETRY_SECONDS="500"), check=True)
    worker.until(lambda: "exit code 1" in worker("logs").stdout)
    assert worker("stop").stdout.strip() == "mila-worker w stopped 1"


def test_log_is_followed_to_the_end_of_the_run(worker):
    worker.codes("wait", "0")
    worker("start", "--", "train")
    command = ["bash", worker.home / "tpu_worker.sh", "logs", "--follow"]
    follow = subprocess.Popen(command, env=worker.environment(), stdout=subprocess.PIPE, text=True)
    worker.until(lambda: (worker.home / "attempts").exists())
    worker("stop")
    assert "exit code 75" in follow.communicate(timeout=30)[0]


def test_container_hands_75_on_and_tries_failures_again(worker):
    """In a container the orchestrator starts all of them again; SIGTERM comes to the script, which replaced the shell that started it."""
    script = "mila_jax/scripts/tpu_worker.sh"
    worker.codes("1", "75", "0")
    done = worker("run", "--extra=tpu", "--", "train", script=script)
    assert done.returncode == 75 and worker.attempts == ["1", "75"]
    assert (worker.home / "setups").read_text() == "--extra=tpu PYTHON=\n"
    worker.codes("5", "5")
    assert worker("run", "--tries=2", f"--python={worker.home / 'mila_jax/scripts/mila.sh'}", "--", "train", script=script).returncode == 5
    worker.codes("wait")
    inside = f"(exec bash '{worker.home / script}' run -- train) & trap 'kill -TERM $!' TERM; wait; wait $!; exit $?"
    shell = subprocess.Popen(["bash", "-c", inside], env=worker.environment(), stdout=subprocess.DEVNULL)
    worker.until(lambda: worker.attempts[-1] == "wait")
    shell.terminate()
    assert shell.wait(timeout=30) == 75 and worker.attempts[-1] == "saved"


def test_new_copy_replaces_the_old_one_and_nothing_else(worker, tmp_path):
    def archive(*names):
        for name in names:
            path = tmp_path / "source" / "mila_jax" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(SETUP if name.endswith("setup.sh") else MILA)
        with tarfile.open(worker.home / "new.tar.gz", "w:gz") as tar:
            for name in names:
                tar.add(tmp_path / "source" / "mila_jax" / name, f"mila_jax/{name}")

    common = ("scripts/setup.sh", "scripts/mila.sh")
    archive(*common, "old module.py")
    assert worker("setup", "--extra=tpu", "--extra=gcs", "new.tar.gz").returncode == 2  # not in this folder
    os.chdir(worker.home)
    try:
        done = worker("setup", "--extra=tpu", "--extra=gcs", str(worker.home / "new.tar.gz"))
    finally:
        os.chdir(ROOT)
    assert done.returncode == 0, done.stderr
    mine = worker.home / "mila_jax" / "runs" / "mine.txt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("kept")
    archive(*common, "new module.py")
    assert worker("setup", str(worker.home / "new.tar.gz")).returncode == 0
    assert not (worker.home / "mila_jax" / "old module.py").exists() and (worker.home / "mila_jax" / "new module.py").exists()
    assert mine.read_text() == "kept"
    assert (worker.home / "setups").read_text().splitlines() == ["--extra=tpu --extra=gcs PYTHON=", " PYTHON="]


@pytest.mark.parametrize("venv", ("missing", "without pip"))
def test_old_images_get_python_from_uv(venv, worker, tmp_path):
    if venv == "missing":
        shutil.rmtree(worker.home / "mila_jax" / ".venv")
    log = tmp_path / "uv.log"
    uv = f'#!/bin/bash\necho "uv $*" >> "{log}"\nif [ "$2" = find ]; then echo "/uv/python3.12"; fi\n'
    pip = f'#!/bin/bash\necho "python3 $*" >> "{log}"\nmkdir -p "$HOME/.local/bin"\ncp "{tmp_path}/uv" "$HOME/.local/bin/uv"\n'
    write_tool(tmp_path / "bin" / "python3", pip)
    write_tool(tmp_path / "uv", uv)
    done = worker("run", "--", "train", script="mila_jax/scripts/tpu_worker.sh", NO_PYTHON="1", NO_PIP="1", PATH=f"{tmp_path / 'bin'}:{worker.tools}")
    assert done.returncode == 0, done.stderr
    assert log.read_text().splitlines() == ["python3 -m pip install --quiet --user uv", "uv python install 3.12", "uv python find 3.12"]
    assert (worker.home / "setups").read_text() == " PYTHON=/uv/python3.12\n"


@pytest.mark.parametrize("script", LAUNCHERS + SHARED)
def test_launchers_parse(script):
    done = subprocess.run(["bash", "-n", ROOT / "scripts" / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.access(ROOT / "scripts" / script, os.X_OK)
