"""The fixed rows of the nuScenes v1.0 tables (taxonomy, sensors, maps) and how the 13 tables are put together.

The names are facts of the public nuScenes schema: a tool that was written for the real data looks categories, attributes and
channels up by these strings.
"""

import hashlib
import os
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from mila_jax.errors import UserError
from mila_jax.views import VIEWS

TABLES = (
    "category",
    "attribute",
    "visibility",
    "instance",
    "sensor",
    "calibrated_sensor",
    "ego_pose",
    "log",
    "scene",
    "sample",
    "sample_data",
    "sample_annotation",
    "map",
)
# Tables whose rows belong to one scene; the others are the same for every data set.
SCENE_TABLES = ("instance", "calibrated_sensor", "ego_pose", "log", "scene", "sample", "sample_data", "sample_annotation")

CATEGORIES = (
    "human.pedestrian.adult",
    "human.pedestrian.child",
    "human.pedestrian.wheelchair",
    "human.pedestrian.stroller",
    "human.pedestrian.personal_mobility",
    "human.pedestrian.police_officer",
    "human.pedestrian.construction_worker",
    "animal",
    "vehicle.car",
    "vehicle.motorcycle",
    "vehicle.bicycle",
    "vehicle.bus.bendy",
    "vehicle.bus.rigid",
    "vehicle.truck",
    "vehicle.construction",
    "vehicle.emergency.ambulance",
    "vehicle.emergency.police",
    "vehicle.trailer",
    "movable_object.barrier",
    "movable_object.trafficcone",
    "movable_object.pushable_pullable",
    "movable_object.debris",
    "static_object.bicycle_rack",
)
ATTRIBUTES = (
    "vehicle.moving",
    "vehicle.stopped",
    "vehicle.parked",
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.sitting_lying_down",
    "pedestrian.standing",
    "pedestrian.moving",
)
VISIBILITIES = (("1", "v0-40", 0.0), ("2", "v40-60", 0.4), ("3", "v60-80", 0.6), ("4", "v80-100", 0.8))
LOCATIONS = ("singapore-onenorth", "singapore-hollandvillage", "singapore-queenstown", "boston-seaport")
LIDAR = "LIDAR_TOP"
CHANNELS = VIEWS + (LIDAR,)


def token(*parts) -> str:
    """A 32-digit token, as in nuScenes, that depends on `parts` only."""
    return hashlib.md5("/".join(map(str, parts)).encode()).hexdigest()


def visibility_token(fraction: float) -> str:
    """The nuScenes visibility level ("1" … "4") of an object of which `fraction` (0..1) is seen over all six images."""
    return [name for name, _, least in VISIBILITIES if fraction >= least or least == 0][-1]


def write_json(path: Path, value) -> None:
    """Writes `value` as JSON so that `path` holds either its old content or all of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(msgspec.json.encode(value))
    os.replace(partial, path)


def read_json(path: Path):
    """JSON at `path`; `UserError` naming the file when it is not valid JSON."""
    try:
        return msgspec.json.decode(Path(path).read_bytes())
    except msgspec.DecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it and run the command again") from None


def fixed_rows(logs: list[dict], root: Path) -> dict[str, list[dict]]:
    """Rows of the tables that do not belong to a scene; `logs` are all rows of the log table, which the maps refer to.

    The map masks say "drivable" everywhere: the simulator has no surveyed map, but readers want the file.
    """
    rows = {
        "category": [{"token": token("category", n), "name": n, "description": n, "index": i} for i, n in enumerate(CATEGORIES, 1)],
        "attribute": [{"token": token("attribute", n), "name": n, "description": n} for n in ATTRIBUTES],
        "visibility": [
            {"token": t, "level": level, "description": f"visibility of whole object is in the range {level[1:]} %"} for t, level, _ in VISIBILITIES
        ],
        "sensor": [{"token": token("sensor", c), "channel": c, "modality": "lidar" if c == LIDAR else "camera"} for c in CHANNELS],
        "map": [],
    }
    (root / "maps").mkdir(parents=True, exist_ok=True)
    for location in LOCATIONS:
        filename = f"maps/{token('map', location)}.png"
        Image.fromarray(np.full((64, 64), 255, np.uint8)).save(root / filename)
        at = [log["token"] for log in logs if log["location"] == location]
        rows["map"].append({"token": token("map", location), "log_tokens": at, "category": "semantic_prior", "filename": filename})
    return rows


def assemble(root: Path, version: str, partials: list[dict]) -> None:
    """Writes the 13 tables from the rows of the scenes; each of `partials` maps the names in `SCENE_TABLES` to rows."""
    rows = {name: [row for partial in partials for row in partial[name]] for name in SCENE_TABLES}
    rows |= fixed_rows(rows["log"], root)
    for name in TABLES:
        write_json(root / version / f"{name}.json", rows[name])
