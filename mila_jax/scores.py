"""Scores of a model on held-out scenes: the command `mila evaluate`, and the numbers in the demo's report."""

import json
import pathlib
import tempfile

import numpy as np

from data_pipeline.clips import read_scene
from data_pipeline.records import read_index
from data_pipeline.storage import is_remote
from mila_jax.choose_model import load_chosen, signature
from mila_jax.errors import UserError
from mila_jax.evaluate import consistency, efficientnet, frechet, quality
from mila_jax.evaluate.lpips import Lpips
from mila_jax.evaluate.video import atomic_path
from mila_jax.decode import open_decoder
from mila_jax.generate import Generator, check_fits, window_settings
from mila_jax.prepare import open_codec
from mila_jax.start import frame_count, from_scene
from mila_jax.views import view_index

FEATURE_SIZE = 112  # pixels; small, so that a minute's scores take seconds on a CPU
FRONT = view_index("CAM_FRONT")


def compare(generated, real, *, extractor=None, progress: bool = False) -> list[dict]:
    """FD-EffNetLite0 of generated against real frames, with sanity values beside it. Lower is better; not an FID.

    generated, real: uint8 [t, 6, H, W, 3]. Rows: all six views pooled (`multi`) and CAM_FRONT alone (`front`), each with the
    distance between the odd and the even frames of the real video (a floor that nothing reaches: neighbours in time are nearly the same picture) and
    of the real video to a still (its first instant repeated).
    """
    extractor = extractor or efficientnet.FeatureExtractor(FEATURE_SIZE)
    features = {}
    for name, frames in (("generated", generated), ("real", real)):
        flat = extractor(np.ascontiguousarray(frames).reshape((-1,) + frames.shape[2:]), progress)
        features[name] = flat.reshape(frames.shape[:2] + (-1,))
    rows = []
    for name, views in (("multi", slice(None)), ("front", [FRONT])):
        fake, true = (features[k][:, views] for k in ("generated", "real"))

        def flat(x):
            return x.reshape(-1, x.shape[-1])

        rows.append(
            {
                "views": name,
                frechet.NAME: frechet.frechet_distance(flat(fake), flat(true)),
                "real vs real (odd, even frames)": frechet.frechet_distance(flat(true[0::2]), flat(true[1::2])),
                "still vs real": frechet.frechet_distance(flat(np.repeat(true[:1], len(true), 0)), flat(true)),
                "pictures": len(flat(fake)),
                "network": extractor.describe(),
            }  # fmt: skip
        )
    return rows


def agreement(videos: dict, start) -> list[dict]:
    """View agreement at shared edges (see `evaluate.consistency`) of named videos uint8 [t, 6, H, W, 3] with the rig of a `Start`."""
    return consistency.agreement_table(videos, start.intrinsics, start.extrinsics[:, :3], start.extrinsics[:, 3:])


def reconstruction(codec, images) -> tuple[float, np.ndarray]:
    """Mean PSNR in dB of the autoencoder on images uint8 [n, H, W, 3], and its reconstructions."""
    latents = (codec.encode(images) - codec.shift) / codec.scale
    back = codec.decode(latents)
    return float(np.minimum(quality.psnr(images, back), 99).mean()), back


def held_out_images(nuscenes_root, version: str, image_size, count: int = 48) -> np.ndarray:
    """About `count` images uint8 [n, H, W, 3], all six views, evenly over the val scenes of a nuScenes data set."""
    from data_pipeline.nuscenes.reader import instants, load_image, open_nuscenes

    nusc = open_nuscenes(nuscenes_root, version)
    moments = [m for scene in nusc.scenes if scene.split == "val" for m in instants(scene)]
    if not moments:
        raise UserError(f"{nuscenes_root} has no val scenes to measure reconstruction on")
    chosen = np.linspace(0, len(moments) - 1, max(1, count // 6)).astype(int)
    return np.stack([load_image(nusc.root / f, *image_size) for i in chosen for f in moments[i].files])


def evaluate_command(config, *, clips: int, seconds: float, out, lpips: bool = False, progress: bool = True) -> dict:
    """`mila evaluate`: prints (and writes to `out`) the scores of `generate.weights` on the val scenes of `data.dir`.

    `clips` videos of `seconds` each, starts spread over the val scenes. With `data.nuscenes` set, the autoencoder's PSNR too, and with `lpips` its
    LPIPS.
    """
    if config.data.dir is None:
        raise UserError("data.dir is not set; give --config.data.dir=FOLDER of an encoded data set")
    if clips < 1:
        raise UserError(f"--clips={clips} must be at least 1")
    if lpips and not config.data.nuscenes:
        raise UserError("--lpips without --preset is the autoencoder's; set --config.data.nuscenes=FOLDER, or give --preset=NAME")
    if out:
        check_file(out)
    perceptual = Lpips() if lpips else None
    frames = frame_count(seconds, least=4)  # the distance between odd and even frames needs two of each
    model = load_chosen(config)
    config = window_settings(model, config)
    codec = open_codec(config)
    check_fits(model, codec, config.data.dir)
    generator, decoder = Generator(model, config), open_decoder(codec, config)
    names = [s.name for s in read_index(config.data.dir).scenes if s.split == "val"]
    if not names:
        raise UserError(f"{config.data.dir} has no val scenes")
    generated, real, agreements = [], [], []
    for number in range(clips):
        scene = read_scene(config.data.dir, names[number % len(names)])
        latest = scene["times"][-1] - seconds
        if latest < 1:
            raise UserError(f"--seconds={seconds:g} is longer than val scene {scene['name']!r} ({scene['times'][-1]:.1f} s); lower it")
        round_ = number // len(names)
        rounds = -(-clips // len(names))
        start, after = from_scene(scene, 1 + (latest - 1) * round_ / max(rounds - 1, 1), config.window.conditioning)
        result, _ = generator([start], frames, seed=config.seed + number)
        generated.append(np.stack(list(decoder(result.latents[0]))))
        real.append(np.stack(list(decoder(scene["latents"][after[:frames]].swapaxes(0, 1)))))
        agreements.append(agreement({"generated": generated[-1], "real": real[-1]}, start))
    rows = compare(np.concatenate(generated), np.concatenate(real), progress=progress)
    scores = {"clips": clips, "seconds": seconds, "weights_sha256": model.sha256, "made_by": signature(model, config.generate), "distances": rows}
    scores["real_frames"] = "decoded from their latents, so the autoencoder's loss is not counted"
    for key in ("correlation", "wrong_pairing_correlation"):
        scores[f"view_agreement_{key}"] = {a["video"]: float(np.mean([t[i][key] for t in agreements])) for i, a in enumerate(agreements[0])}
    if config.data.nuscenes:
        images = held_out_images(config.data.nuscenes, config.data.version, model.data["image_size"])
        scores["reconstruction_psnr_db"], back = reconstruction(codec, images)
        if perceptual:
            scores["reconstruction_lpips"], scores["lpips"] = float(perceptual(images, back).mean()), perceptual.describe()
    text = json.dumps(scores, indent=1)
    print(text)
    if out:
        with atomic_path(out) as path:
            path.write_text(text)
    return scores


def check_file(path) -> None:
    """Raises `UserError` if the file `path` could not be written, and for an address (gs://…); what is there stays."""
    if is_remote(path):
        raise UserError(f"--out={path} is an address; give a file of this machine")
    path = pathlib.Path(path)
    if path.is_dir():
        raise UserError(f"cannot write {path}, it is a folder; --out is a file here (a folder only with evaluate --preset)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose another --out") from None
