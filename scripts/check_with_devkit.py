"""The three steps of scripts/check_with_devkit.sh: simulate and export run beside mila_jax, compare beside nuscenes-devkit.

python scripts/check_with_devkit.py simulate ROOT VERSION        two scenes of 4 s
python scripts/check_with_devkit.py export ROOT VERSION JSON     what our reader sees, per scene and camera
python scripts/check_with_devkit.py compare ROOT VERSION JSON    walks everything with the devkit; exit code 1 on a difference
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

TRACK_FIELDS = ("intrinsics", "cam2ego_translation", "cam2ego_rotation", "ego_translation", "ego_rotation")


def simulate(root, version):
    """Writes a small data set with the real renderer."""
    from data_pipeline.simulator.write import SimulatorConfig, simulate

    simulate(root, SimulatorConfig(scenes=2, seconds=4.0, version=version))


def export(root, version, path):
    """Writes our reader's view of the data set as JSON."""
    from data_pipeline.nuscenes.reader import open_nuscenes

    out = {}
    for scene in open_nuscenes(root, version).scenes:
        out[scene.name] = {"description": scene.description, "location": scene.location, "cameras": {}}
        for name, track in scene.tracks.items():
            camera = {"timestamps": track.timestamps_us.tolist(), "key": track.key.tolist(), "files": track.files}
            out[scene.name]["cameras"][name] = camera | {f: getattr(track, f).tolist() for f in TRACK_FIELDS}
    pathlib.Path(path).write_text(json.dumps(out))


def compare(root, version, path):
    """Walks scenes, samples, chains, annotations and boxes with the devkit and compares each camera record with `path`."""
    import numpy as np
    from nuscenes.nuscenes import NuScenes
    from nuscenes.utils.data_classes import LidarPointCloud
    from PIL import Image

    ours = json.loads(pathlib.Path(path).read_text())
    nusc = NuScenes(version=version, dataroot=root, verbose=True)
    count = dict(scenes=0, samples=0, records=0, boxes=0, boxes_in_images=0, lidar_points=0, annotations=0)
    assert sorted(ours) == sorted(s["name"] for s in nusc.scene), "scene names differ"
    for scene in nusc.scene:
        count["scenes"] += 1
        mine = ours[scene["name"]]
        assert mine["description"] == scene["description"]
        assert mine["location"] == nusc.get("log", scene["log_token"])["location"]
        token, tokens = scene["first_sample_token"], []
        while token:
            sample = nusc.get("sample", token)
            tokens.append(token)
            for channel, data in sample["data"].items():
                file, boxes, _ = nusc.get_sample_data(data)
                count["boxes_in_images"] += len(boxes) if channel.startswith("CAM") else 0
                if channel == "LIDAR_TOP":
                    count["lidar_points"] += LidarPointCloud.from_file(file).nbr_points()
                count["boxes"] += len(nusc.get_boxes(data))
            for annotation in sample["anns"]:
                row = nusc.get("sample_annotation", annotation)
                assert row["category_name"] and nusc.box_velocity(annotation).shape == (3,)
                count["annotations"] += 1
            count["samples"] += 1
            token = sample["next"]
        assert len(tokens) == scene["nbr_samples"] and tokens[-1] == scene["last_sample_token"]
        first = nusc.get("sample", tokens[0])
        for channel, camera in mine["cameras"].items():
            token, i = first["data"][channel], 0
            while token:
                row = nusc.get("sample_data", token)
                pose = nusc.get("ego_pose", row["ego_pose_token"])
                calibration = nusc.get("calibrated_sensor", row["calibrated_sensor_token"])
                assert row["timestamp"] == camera["timestamps"][i] and row["filename"] == camera["files"][i], (channel, i)
                assert row["is_key_frame"] == camera["key"][i], (channel, i)
                k, size = calibration["camera_intrinsic"], (row["width"], row["height"])
                fractions = [k[0][0] / size[0], k[1][1] / size[1], k[0][2] / size[0], k[1][2] / size[1]]
                theirs = (fractions, calibration["translation"], calibration["rotation"], pose["translation"], pose["rotation"])
                for field, value in zip(TRACK_FIELDS, theirs):
                    np.testing.assert_allclose(camera[field][i], value, rtol=0, atol=1e-12, err_msg=f"{channel} {i} {field}")
                with Image.open(nusc.get_sample_data_path(token)) as image:
                    assert image.size == size
                count["records"] += 1
                i, token = i + 1, row["next"]
            by_time = len(camera["timestamps"])
            assert i == by_time, f"{scene['name']} {channel}: {i} records by prev/next, {by_time} by time"
    print("the devkit and our reader agree:", ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in count.items()))


def main():
    """Dispatches to a step."""
    steps = {"simulate": simulate, "export": export, "compare": compare}
    if len(sys.argv) < 2 or sys.argv[1] not in steps:
        raise SystemExit(__doc__)
    try:
        steps[sys.argv[1]](*sys.argv[2:])
    except AssertionError as error:
        raise SystemExit(f"error: the devkit and our reader differ: {error}") from error


if __name__ == "__main__":
    main()
