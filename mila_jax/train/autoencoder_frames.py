"""Camera frames of a nuScenes-format data set, held in memory for the autoencoder's training."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from data_pipeline.nuscenes.reader import load_image, open_nuscenes
from data_pipeline.storage import join
from mila_jax.errors import UserError

HELD_OUT = 512  # frames of the val split are enough to measure PSNR to 0.1 dB


def split_frames(root, version: str, height: int, width: int, max_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, val) frames of all six cameras, uint8 [n, height, width, 3], at most `max_frames` and 512, evenly spaced.

    UserError when the data set cannot be read, an image is broken, or a split has no frames.
    """
    scenes = open_nuscenes(root, version).scenes
    if max_frames < 1:
        raise UserError(f"--max-frames={max_frames} must be at least 1")
    frames = {}
    for split, limit in (("train", max_frames), ("val", HELD_OUT)):
        files = [file for scene in scenes if scene.split == split for track in scene.tracks.values() for file in track.files]
        if not files:
            raise UserError(f"{root} {version} has no frames in its {split!r} split; write or unpack more scenes")
        files = files[:: math.ceil(len(files) / limit)]
        frames[split] = _load(root, files, height, width, f"{split} frames")
    return frames["train"], frames["val"]


def _load(root, files: list[str], height: int, width: int, label: str) -> np.ndarray:
    images = np.empty((len(files), height, width, 3), np.uint8)

    def load(i: int) -> None:
        images[i] = load_image(join(root, files[i]), height, width)

    with ThreadPoolExecutor() as pool:  # JPEG decoding leaves the interpreter lock
        for _ in tqdm(pool.map(load, range(len(files))), total=len(files), desc=label):
            pass
    return images
