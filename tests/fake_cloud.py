"""A `gcloud` and an `xpk` for tests: they write down what they are asked, and keep a little cloud in a folder.

Run as a script under one of these names. In the folder $FAKE_CLOUD:
`calls.jsonl` every call; `lives.json` a list of lives, one for each `create`: the states that `describe` tells one after another, the last
one for ever; `workers.json` how many workers a slice has. A worker is a folder, its ssh is `bash -c` in it. When a life comes to SUSPENDING
or PREEMPTED, its workers are gone with their processes, as on a pre-emption.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

CLOUD = pathlib.Path(os.environ["FAKE_CLOUD"])
GONE = ("SUSPENDING", "SUSPENDED", "FAILED", "PREEMPTED")


def load(name, default):
    path = CLOUD / name
    return json.loads(path.read_text()) if path.exists() else default


def save(name, value):
    (CLOUD / name).write_text(json.dumps(value))


def workers():
    return sorted((CLOUD / "workers").glob("*"))


def destroy():
    for worker in workers():
        pid = worker / "mila_jax" / "runs" / "launcher" / "pid"
        if pid.exists():
            try:
                os.killpg(int(pid.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                pass
        shutil.rmtree(worker, ignore_errors=True)


def create(ready):
    if (CLOUD / "life.json").exists():
        return refuse("ALREADY_EXISTS: there is one of this name")
    first, *later = load("lives.json", []) or [[ready]]
    save("life.json", first)
    save("lives.json", later)
    for i in range(load("workers.json", 1)):
        (CLOUD / "workers" / str(i)).mkdir(parents=True)
    return 0


def describe():
    life = load("life.json", None)
    if life is None:
        return refuse("NOT_FOUND: Resource was not found")
    state = life[0]
    save("life.json", life[1:] or life)
    if state in GONE:
        destroy()
    if state == "UNREACHABLE":
        return refuse("connection reset")
    print(state)
    return 0


def delete():
    destroy()
    (CLOUD / "life.json").unlink()
    return 0


def chosen(flags):
    return [w for w in workers() if flags["--worker"] in ("all", w.name)]


def ssh(flags):
    codes = []
    for worker in chosen(flags):
        environment = {**os.environ, "HOME": str(worker), "HOSTNAME": f"w-{worker.name}"}
        codes.append(subprocess.run(["bash", "-c", flags["--command"]], cwd=worker, env=environment, stdin=subprocess.DEVNULL).returncode)
    return max(codes) if codes else refuse("no such worker")


def scp(paths, flags):
    *sources, destination = paths
    if not chosen(flags):
        return refuse("no such worker")
    for worker in chosen(flags):
        if ":" in destination:
            for source in sources:
                shutil.copy(source, worker / destination.split(":")[1])
        else:
            source = worker / sources[0].split(":")[1]
            shutil.copytree(source, pathlib.Path(destination) / source.name)
    return 0


def refuse(message):
    print(f"ERROR: (fake) {message}", file=sys.stderr)
    return 1


def main():
    tool = pathlib.Path(sys.argv[0]).name
    with open(CLOUD / "calls.jsonl", "a") as file:
        file.write(json.dumps([tool, *sys.argv[1:]]) + "\n")
    words = [a for a in sys.argv[1:] if not a.startswith("--")]
    flags = dict(a.split("=", 1) for a in sys.argv[1:] if a.startswith("--") and "=" in a)
    if tool == "xpk":
        return load("xpk_code.json", 0)
    if words[:2] == ["config", "get-value"]:
        print(load("config.json", {}).get(words[2], ""))
        return 0
    assert words[:2] == ["compute", "tpus"], words
    ready = {"tpu-vm": "READY", "queued-resources": "ACTIVE"}[words[2]]
    verbs = {"create": lambda: create(ready), "describe": describe, "delete": delete, "ssh": lambda: ssh(flags), "scp": lambda: scp(words[4:], flags)}
    return verbs[words[3]]()


if __name__ == "__main__":
    sys.exit(main())
