"""Writes simulated drives in the official nuScenes v1.0 on-disk format.

<root>/<version>/*.json           the 13 tables, put together when all scenes are done
<root>/<version>/scenes/*.json    each finished scene's rows: what makes an interrupted run go on where it stopped
<root>/<version>/splits.json      {"train": [names], "val": [names]}: nuScenes has no split for these scenes
<root>/<version>/simulator.json   the settings that every scene of this data set was made with
<root>/samples, <root>/sweeps     keyframes and the frames between them, JPEG; keyframe lidar points, .pcd.bin
<root>/maps                       one mask per location
"""

import concurrent.futures
import dataclasses
import functools
import math
import multiprocessing
import shutil
from pathlib import Path

import tqdm

from data_pipeline.simulator import tables
from data_pipeline.simulator.rig import load_rig
from data_pipeline.simulator.scene import scene_name, write_scene
from data_pipeline.storage import is_remote
from mila_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SimulatorConfig:
    """What to simulate. Sizes in pixels, lengths in seconds; the first `val_scenes` scenes form the validation split, so
    that adding scenes later moves none from one split to the other."""

    scenes: int = 8
    seconds: float = 20.0
    height: int = 64
    width: int = 112
    seed: int = 0
    jpeg_quality: int = 92
    version: str = "v1.0-sim"
    val_scenes: int = 1


def simulate(root, config: SimulatorConfig, progress: bool = True, world_factory=None, renderer_factory=None, workers: int = 1) -> None:
    """Writes the data set `config` describes under `root`; scenes that are complete there are reused.

    workers: processes that render scenes side by side (one process draws one ray bundle after the other on one core); the bytes
    do not depend on it.

    world_factory(seed, index, seconds) -> World and renderer_factory(world, rig, height, width) -> Renderer default to the
    simulator's own. The same config gives the same bytes. Raises UserError when `root` holds a data set made with other
    settings (more scenes are no other setting), when it cannot be written or is an address, and for settings that make no sense.
    """
    check(config)
    if is_remote(root):  # a Path would take it for a folder of this machine named `gs:`
        raise UserError(f"--out={root} is an address; give a folder of this machine")
    root = Path(root)
    home = root / config.version
    try:
        claim(home, config)
        indices = range(1, config.scenes + 1)
        paths = [home / "scenes" / f"{scene_name(i)}.json" for i in indices]
        missing = [i for i, path in zip(indices, paths) if finished_scene(root, path) is None]
        make = functools.partial(make_scene, root, config, world_factory, renderer_factory)
        with tqdm.tqdm(total=config.scenes, initial=config.scenes - len(missing), desc="simulate", unit="scene", disable=not progress) as bar:
            for _ in in_processes(make, missing, workers):
                bar.update()
        partials = [tables.read_json(path) for path in paths]
        tables.assemble(root, config.version, partials)
        names = [scene_name(i) for i in range(1, config.scenes + 1)]
        tables.write_json(home / "splits.json", {"train": names[config.val_scenes :], "val": names[: config.val_scenes]})
    except OSError as error:
        where = error.filename or root
        raise UserError(f"cannot write the simulated data set: {where}: {error.strerror}; choose another folder") from error


def make_scene(root: Path, config: SimulatorConfig, world_factory, renderer_factory, index: int) -> None:
    """Writes the files of scene `index`, then (its mark of completeness) its rows."""
    if world_factory is None:
        from data_pipeline.simulator.world import make_world as world_factory
    if renderer_factory is None:
        from data_pipeline.simulator.render import Renderer as renderer_factory
    rig = load_rig()
    world = world_factory(config.seed, index, config.seconds)
    renderer = renderer_factory(world, rig, config.height, config.width)
    rows = write_scene(root, config, index, world, rig, renderer)
    tables.write_json(root / config.version / "scenes" / f"{scene_name(index)}.json", rows)


def in_processes(make, indices, workers: int):
    """Yields as each call make(index) ends; in this process for one worker, else in fresh ones (a forked JAX may hang)."""
    if workers <= 1 or len(indices) <= 1:
        for index in indices:
            make(index)
            yield
        return
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(indices)), multiprocessing.get_context("spawn")) as pool:
        try:
            for future in concurrent.futures.as_completed([pool.submit(make, index) for index in indices]):
                future.result()
                yield
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                "a rendering process was killed (out of memory?); finished scenes are kept, lower simulate.workers and run again"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def check(config: SimulatorConfig) -> None:
    """Raises UserError naming the key when a setting makes no sense."""
    if config.scenes < 1:
        raise UserError(f"simulate.scenes={config.scenes}: at least 1 scene is needed")
    if not 0 <= config.val_scenes <= config.scenes:
        raise UserError(f"simulate.val_scenes={config.val_scenes} must lie between 0 and simulate.scenes={config.scenes}")
    if not 1 <= config.seconds < math.inf:
        raise UserError(f"simulate.seconds={config.seconds}: a scene needs at least 1 s to hold two keyframes")
    if config.seed < 0:
        raise UserError(f"simulate.seed={config.seed} must not be negative")
    if config.height < 8 or config.width < 8:
        raise UserError(f"simulate.height={config.height}, simulate.width={config.width}: at least 8 pixels each")


def claim(home: Path, config: SimulatorConfig) -> None:
    """Marks `home` as holding data of `config`; UserError when it holds data made with other settings."""
    wanted = dataclasses.asdict(config) | {"seconds": float(config.seconds)}
    for extendable in ("scenes", "val_scenes"):
        del wanted[extendable]
    path = home / "simulator.json"
    if path.exists():
        found = tables.read_json(path)
        different = [k for k in wanted if found.get(k) != wanted[k]]
        if different:
            was = ", ".join(f"{k}={found.get(k)!r}" for k in different)
            now = ", ".join(f"{k}={wanted[k]!r}" for k in different)
            raise UserError(f"{home} was simulated with {was}, now asked for {now}; choose another folder (mila demo: --fresh)")
    elif (home / "scene.json").exists():
        raise UserError(f"{home} holds a nuScenes data set that the simulator did not write; choose another folder")
    else:
        tables.write_json(path, wanted)


def simulated_seconds(root, version: str) -> float | None:
    """Length of the scenes of the simulated data set `version` under `root`, None where there is none. `UserError` for a damaged record of it."""
    path = Path(root) / version / "simulator.json"
    found = tables.read_json(path) if path.exists() else {}
    return found.get("seconds")


def remove(root, version: str) -> None:
    """Deletes the simulated data set `version` under `root` (what --fresh does); UserError when the simulator did not write it."""
    root = Path(root)
    if not root.exists():
        return
    if not (root / version / "simulator.json").exists():
        raise UserError(f"{root / version} was not written by the simulator and is not deleted; choose another folder")
    others = [p for p in root.glob("*/sample_data.json") if p.parent.name != version]
    if not others:
        for name in (version, "samples", "sweeps", "maps"):
            shutil.rmtree(root / name, ignore_errors=True)
        return
    # Another data set shares the image folders: take away only what the scenes of this one name.
    for path in (root / version / "scenes").glob("*.json"):
        for row in tables.read_json(path)["sample_data"]:
            (root / row["filename"]).unlink(missing_ok=True)
    shutil.rmtree(root / version)


def finished_scene(root: Path, path: Path):
    """The stored rows of a scene, or None when it must be made (again): no rows, or one of its files is gone."""
    if not path.exists():
        return None
    partial = tables.read_json(path)
    return partial if all((root / row["filename"]).exists() for row in partial["sample_data"]) else None
