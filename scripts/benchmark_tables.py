"""How long and how much memory the nuScenes tables take at their real size: `python scripts/benchmark_tables.py --out=FOLDER`.

Writes tables with as many rows, and rows as long, as those of v1.0-trainval (850 scenes, 34,149 samples, 2.63 million sample_data),
then opens them in fresh processes: with a plain `json.load` (the baseline: what nuscenes-devkit does), with the index built, and
with the index kept from before. Needs 2.7 GB of disk; `--scenes=85` takes a tenth of everything.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import resource
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

VERSION = "v1.0-trainval"
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
RADARS = ("RADAR_FRONT", "RADAR_FRONT_LEFT", "RADAR_FRONT_RIGHT", "RADAR_BACK_LEFT", "RADAR_BACK_RIGHT")
RECORDS = dict.fromkeys(CAMERAS, 235) | dict.fromkeys(RADARS, 258) | {"LIDAR_TOP": 396}  # of a scene
KEYFRAMES = 40


def token(*parts) -> str:
    """A 32-digit token that depends on `parts` only."""
    return hashlib.md5("/".join(map(str, parts)).encode()).hexdigest()


class Table:
    """A JSON list written row by row in the published files' layout: one field a line, no indent."""

    def __init__(self, folder, name):
        self.file, self.rows = open(folder / f"{name}.json", "w"), 0

    def add(self, row: dict) -> None:
        """Appends a row."""
        self.file.write(("[\n" if not self.rows else ",\n") + json.dumps(row, indent=0))
        self.rows += 1

    def close(self) -> int:
        """Ends the list; returns its rows."""
        self.file.write("\n]")
        self.file.close()
        return self.rows


def write_tables(folder, scenes: int) -> dict[str, int]:
    """Writes the tables that the reader needs; rows of each."""
    from data_pipeline.nuscenes.splits import official_scenes

    names = sorted(official_scenes("train") + official_scenes("val"))[:scenes]
    draw = random.Random(0)
    tables = {n: Table(folder, n) for n in ("sensor", "calibrated_sensor", "ego_pose", "log", "scene", "sample", "sample_data")}
    for channel in RECORDS:
        tables["sensor"].add({"token": token(channel), "channel": channel, "modality": channel.split("_")[0].lower()})
    for name in names:
        log = token("log", name)
        tables["log"].add({"token": log, "logfile": "n015-2018-07-18-11-07-57+0800", "vehicle": "n015", "date_captured": "2018-07-18",
                           "location": "singapore-onenorth"})  # fmt: skip
        samples = [token(name, "sample", k) for k in range(KEYFRAMES)]
        tables["scene"].add({"token": token("scene", name), "log_token": log, "nbr_samples": KEYFRAMES, "first_sample_token": samples[0],
                             "last_sample_token": samples[-1], "name": name,
                             "description": "Parked truck, construction, intersection, turn left, following a van"})  # fmt: skip
        start = 1531883530000000 + int(name[-4:]) * 10**9
        for k, sample in enumerate(samples):
            tables["sample"].add({"token": sample, "timestamp": start + 500000 * k, "prev": samples[k - 1] if k else "",
                                  "next": samples[k + 1] if k < KEYFRAMES - 1 else "", "scene_token": token("scene", name)})  # fmt: skip
        for channel, count in RECORDS.items():
            camera = channel in CAMERAS
            calibration = token(name, channel)
            intrinsic = [[1266.417203046554, 0.0, 816.2670197447984], [0.0, 1266.417203046554, 491.50706579294757], [0.0, 0.0, 1.0]]
            tables["calibrated_sensor"].add({"token": calibration, "sensor_token": token(channel),
                                             "translation": [1.70079118954, 0.0159456324149, 1.51095763913],
                                             "rotation": [0.4998015430569128, -0.5030316162024876, 0.4997798114386805, -0.49737083824542755],
                                             "camera_intrinsic": intrinsic if camera else []})  # fmt: skip
            previous, step = "", 19_500_000 // (count - 1)
            keyed = {round(k * (count - 1) / (KEYFRAMES - 1)): k for k in range(KEYFRAMES)}
            tokens = [token(name, channel, i) for i in range(count)] + [""]
            for i in range(count):
                stamp = start + step * i
                tables["ego_pose"].add({"token": tokens[i], "timestamp": stamp,
                                        "rotation": [draw.random(), draw.random() * 1e-2, draw.random() * 1e-2, -draw.random()],
                                        "translation": [1000 * draw.random(), 1000 * draw.random(), 0.0]})  # fmt: skip
                kind = "samples" if i in keyed else "sweeps"
                following = next((samples[k] for at, k in keyed.items() if at >= i), samples[-1])
                suffix = "jpg" if camera else "pcd.bin" if channel == "LIDAR_TOP" else "pcd"
                tables["sample_data"].add({"token": tokens[i], "sample_token": following, "ego_pose_token": tokens[i],
                                           "calibrated_sensor_token": calibration, "timestamp": stamp,
                                           "fileformat": "jpg" if camera else "pcd", "is_key_frame": i in keyed,
                                           "height": 900 if camera else 0, "width": 1600 if camera else 0,
                                           "filename": f"{kind}/{channel}/n015-2018-07-18-11-07-57+0800__{channel}__{stamp}.{suffix}",
                                           "prev": previous, "next": tokens[i + 1]})  # fmt: skip
                previous = tokens[i]
    return {name: table.close() for name, table in tables.items()}


def measure(what, folder) -> None:
    """One measurement in this process; prints JSON."""
    if what == "json.load":
        began = time.monotonic()
        kept = [json.loads((folder / f"{n}.json").read_bytes()) for n in ("sample_data", "ego_pose", "sample", "calibrated_sensor")]
        records = len(kept[0])
    else:
        from data_pipeline.nuscenes.reader import open_nuscenes

        began = time.monotonic()
        nusc = open_nuscenes(folder.parent, folder.name)
        records = sum(len(t.timestamps_us) for s in nusc.scenes for t in s.tracks.values())
    seconds = time.monotonic() - began
    print(json.dumps({"seconds": seconds, "records": records, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


def main():
    """Writes the tables unless they are there, then measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--scenes", type=int, default=850)
    parser.add_argument("--no-baseline", action="store_true", help="leave json.load out (about 8 GiB at full size)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.out / VERSION
    if options.measure:
        return measure(options.measure, folder)
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = write_tables(folder, options.scenes)
        (folder / "done").write_text(json.dumps(rows))
    size = {p.name: round(p.stat().st_size / 2**30, 2) for p in folder.glob("*.json") if p.stat().st_size > 2**24}
    print(f"rows {(folder / 'done').read_text()}\nGiB {size}")
    cache = options.out / "cache"
    environment = os.environ | {"MILA_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    for file in cache.rglob("*.safetensors"):
        file.unlink()
    jobs = [] if options.no_baseline else [("json.load", "json.load of the four large tables")]
    for what, label in [*jobs, ("index", "index built and kept"), ("index", "index kept from before")]:
        command = [sys.executable, __file__, f"--out={options.out}", f"--measure={what}"]
        result = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
        print(f"{label}: {result['seconds']:.2f} s, peak {result['gib']:.2f} GiB, {result['records']} records", flush=True)


if __name__ == "__main__":
    main()
