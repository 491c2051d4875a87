"""The command `mila drift`: drift curves of generated videos beside recorded ones, as JSON and as a page."""

import json
import pathlib

import numpy as np

from data_pipeline.clips import read_scene
from data_pipeline.records import read_index
from mila_jax.decode import open_decoder
from mila_jax.errors import UserError
from mila_jax.evaluate import drift
from mila_jax.evaluate.consistency import overlaps
from mila_jax.evaluate.efficientnet import FeatureExtractor
from mila_jax.evaluate.report import Report
from mila_jax.generate_command import writable_folder
from mila_jax.prepare import open_codec
from mila_jax.scores import FEATURE_SIZE


def drift_command(config, folders, out, *, extractor=None, ego_motion=None) -> pathlib.Path:
    """`mila drift`: folders that `mila generate` made, against the val scenes of `data.dir`; writes drift.json and drift.html to `out`.

    Videos of one strategy are one curve. ego_motion: see `evaluate.drift.measure`; used on videos that tell their poses.
    Raises `UserError` for a folder without a finished video.
    """
    if config.data.dir is None:
        raise UserError("data.dir is not set; give --config.data.dir=FOLDER of an encoded data set, whose val scenes are compared with")
    if "temporal" in read_index(config.data.dir).meta:
        raise UserError(f"{config.data.dir} holds temporal latents (autoencoder.temporal); mila drift is for those of single pictures")
    out = writable_folder(out)
    decoder = open_decoder(open_codec(config), config)
    extractor = extractor or FeatureExtractor(FEATURE_SIZE)
    recorded, strips = [], None
    for scene in (s for s in read_index(config.data.dir).scenes if s.split == "val"):
        scene = read_scene(config.data.dir, scene.name)
        frames = list(decoder(scene["latents"].swapaxes(0, 1)))
        strips = overlaps(*(scene[key][0] for key in ("intrinsics", "cam2ego_translation", "cam2ego_rotation")), *frames[0].shape[1:3])
        recorded.append(drift.measure(frames, extractor=extractor, strips=strips))
    if not recorded:
        raise UserError(f"{config.data.dir} has no val scenes to compare with")
    groups, residuals = {}, {}
    for folder in map(pathlib.Path, folders):
        try:
            about = json.loads((folder / "generate.json").read_text())
            with np.load(folder / "latents.npz", allow_pickle=False) as z:
                arrays = {key: z[key] for key in z.files}
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} has no finished video of mila generate ({error})") from None
        if about["frames"] < drift.RATE:
            raise UserError(f"{folder} holds {about['frames']} frames; drift needs at least a second ({drift.RATE})")
        estimator = ego_motion if "poses" in arrays else None
        measured = drift.measure(decoder(arrays["latents"]), extractor=extractor, strips=strips, ego_motion=estimator, poses=arrays.get("poses"))
        groups.setdefault(about["strategy"], []).append(measured)
        if "anchors" in arrays:
            residuals[folder.name] = drift.anchor_residual(arrays["anchors"], arrays["corrected"], about["anchor_stride"])
    named = {name: drift.curves(videos, recorded) for name, videos in groups.items()}
    (out / "drift.json").write_text(json.dumps({"curves": named, "anchor_residual": residuals}, indent=1))
    report = Report("Drift")
    report.add_text(f"{len(folders)} generated videos beside {len(recorded)} recorded scenes (decoded from their latents).")
    drift.add_to_report(report, named, residuals)
    return report.write(out / "drift.html")
