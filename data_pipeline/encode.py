"""The encoding job: every instant's six images once through the autoencoder, every scene's description once through the text
encoder. One shard per scene; a scene whose shard is complete is not encoded again.
"""

import concurrent.futures
import hashlib
import os
from pathlib import Path

import msgspec
import numpy as np
import tqdm

from data_pipeline import records
from data_pipeline.nuscenes.reader import instants, load_image
from mila_jax.errors import UserError

DECODE_THREADS = 4
POSES = ("cam2ego_translation", "cam2ego_rotation", "ego_translation", "ego_rotation")


def encode_dataset(
    nusc,
    out_dir,
    encode_images,
    encode_text,
    *,
    latent_shape,
    image_size,
    latent_shift,
    latent_scale,
    batch: int,
    meta: dict,
    progress: bool = True,
) -> None:
    """Encodes `nusc` into `out_dir` (layout: data_pipeline/records.py).

    encode_images: uint8 [batch, H, W, 3] -> float32 [batch, h, w, c], posterior mean, always with the same `batch` so that it
    compiles once. encode_text: list of n strings -> tokens float32 [n, L, E], mask bool [n, L]. latent_shift, latent_scale: numbers
    or [c]; stored latents are (mean - shift) / scale. meta: JSON-able description of the encoders (names, hashes); a change of it, of
    the sizes or of a scene's records makes the scene be encoded again. Raises UserError naming the file for a missing or
    broken image, an unwritable folder, and latents of another shape than `latent_shape` or not finite.
    """
    out_dir = Path(out_dir)
    latent_shape = tuple(int(n) for n in latent_shape)
    # One number per channel, whichever way it was given.
    shift, scale = (np.broadcast_to(np.asarray(x, np.float32), latent_shape[-1:]) for x in (latent_shift, latent_scale))
    job = {
        "format": records.FORMAT,
        "latent_shape": list(latent_shape),
        "image_size": [int(n) for n in image_size],
        "latent_shift": [float(x) for x in shift],
        "latent_scale": [float(x) for x in scale],
        "meta": meta,
    }
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        encoder = SceneEncoder(nusc.root, out_dir, encode_images, job, batch)
        scenes, counts = [], {}
        total = sum(len(s.tracks["CAM_FRONT"].files) for s in nusc.scenes)
        with tqdm.tqdm(total=total, desc="encode", unit="instant", disable=not progress) as bar:
            for number, scene in enumerate(nusc.scenes):
                shard = records.shard_name(scene.split, counts.setdefault(scene.split, 0))
                counts[scene.split] += 1
                scenes.append(encoder.encode(number, scene, shard))
                bar.update(len(scene.tracks["CAM_FRONT"].files))
        write_text(out_dir, scenes, encode_text)
        write_metadata(out_dir, scenes, latent_shape)
        index = records.Index(scenes=scenes, **{**job, "latent_shape": latent_shape, "image_size": tuple(job["image_size"])})
        records.write_atomically(out_dir / "index.json", msgspec.json.encode(index))
    except OSError as error:
        where = error.filename or out_dir
        raise UserError(f"cannot write the encoded data set: {where}: {error.strerror}; choose another folder") from error


class SceneEncoder:
    """Encodes scenes one by one into shards of `out_dir`."""

    def __init__(self, root, out_dir: Path, encode_images, job: dict, batch: int):
        self.root, self.out_dir, self.encode_images, self.job, self.batch = Path(root), out_dir, encode_images, job, batch
        self.features = records.make_features(job["latent_shape"])
        self.shift = np.asarray(job["latent_shift"], np.float32)
        self.scale = np.asarray(job["latent_scale"], np.float32)

    def encode(self, number: int, scene, shard: str) -> records.SceneIndex:
        """Makes the shard of one scene unless it is complete already; returns the scene's part of the index."""
        moments = instants(scene)
        if not moments:
            raise UserError(
                f"{self.root}: scene {scene.name!r} has no moment at which all six cameras have a frame; take it out of scene.json"
            )
        fingerprint = self.fingerprint(number, scene, moments)
        path, mark = self.out_dir / shard, self.out_dir / f"{shard}.json"
        front = scene.tracks["CAM_FRONT"]
        frames = {"front_us": front.timestamps_us.tolist(), "keyframes": np.flatnonzero(front.key).tolist()}
        done = complete(path, mark, fingerprint)
        if done:
            return msgspec.structs.replace(done, **frames)
        # From here until the mark is written again the shard counts as not there, whatever its file holds; an index that
        # knows its old content must go first.
        if path.exists() or mark.exists():
            (self.out_dir / "index.json").unlink(missing_ok=True)
        mark.unlink(missing_ok=True)
        latents = self.latents(scene, moments)
        record_bytes = self.write_shard(path, number, moments, latents)
        entry = records.SceneIndex(
            name=scene.name,
            description=scene.description,
            location=scene.location,
            split=scene.split,
            shard=shard,
            bytes=path.stat().st_size,
            record_bytes=record_bytes,
            timestamps_us=[m.timestamp_us for m in moments],
            fingerprint=fingerprint,
            **frames,
        )
        records.write_atomically(mark, msgspec.json.encode(entry))
        return entry

    def fingerprint(self, number: int, scene, moments) -> str:
        """A hash of everything that the shard's content depends on, but the pixels themselves."""
        about = [self.job, number, scene.name, scene.token, scene.description, scene.location, scene.split]
        digest = hashlib.sha256(msgspec.json.encode(about, order="sorted"))
        for moment in moments:
            digest.update("\n".join(moment.files).encode())
            for field in ("timestamps_us", "intrinsics", *POSES):
                digest.update(np.ascontiguousarray(getattr(moment, field)).tobytes())
        return digest.hexdigest()

    def latents(self, scene, moments) -> np.ndarray:
        """Normalised latents float16 [n, 6, h, w, c] of a scene's n instants."""
        height, width = self.job["image_size"]
        files = [self.root / name for moment in moments for name in moment.files]
        out = np.empty((len(files), *self.job["latent_shape"]), np.float16)
        starts = range(0, len(files), self.batch)
        with concurrent.futures.ThreadPoolExecutor(DECODE_THREADS) as pool:

            def load(start):
                return [pool.submit(load_image, f, height, width) for f in files[start : start + self.batch]]

            coming = load(0)
            for start in starts:
                images = np.zeros((self.batch, height, width, 3), np.uint8)  # the last batch is padded with black
                ready, coming = coming, load(start + self.batch)  # decodes while this batch is encoded
                for i, image in enumerate(ready):
                    images[i] = image.result()
                mean = np.asarray(self.encode_images(images), np.float32)
                if mean.shape != (self.batch, *self.job["latent_shape"]):
                    raise UserError(
                        f"the autoencoder gives latents {mean.shape[1:]} for images {height}x{width}, but "
                        f"the expected latent shape is {tuple(self.job['latent_shape'])}; make them agree"
                    )
                out[start : start + len(ready)] = ((mean - self.shift) / self.scale)[: len(ready)]
        if not np.isfinite(out).all():
            raise UserError(f"the autoencoder gives latents that are not finite for scene {scene.name!r}; check its weights and scale")
        return out.reshape(len(moments), 6, *self.job["latent_shape"])

    def write_shard(self, path: Path, number: int, moments, latents) -> int:
        """Writes the records under a temporary name and renames; returns their serialised bytes."""
        from array_record.python.array_record_module import ArrayRecordWriter

        partial = path.with_name(path.name + ".tmp")
        # The writer reports a missing or unwritable folder late and without its name; this does at once.
        partial.open("wb").close()
        writer = ArrayRecordWriter(str(partial), records.WRITER_OPTIONS)
        size = 0
        for i, moment in enumerate(moments):
            record = {
                "latents": latents[i],
                "timestamps": moment.timestamps_us,
                "intrinsics": moment.intrinsics.astype(np.float32),
                "cam2ego_translation": moment.cam2ego_translation.astype(np.float32),
                "cam2ego_rotation": moment.cam2ego_rotation.astype(np.float32),
                "ego_translation": moment.ego_translation,
                "ego_rotation": moment.ego_rotation,
                "scene": np.int64(number),
                "instant": np.int64(i),
            }
            data = self.features.serialize_example(record)
            size += len(data)
            writer.write(data)
        writer.close()
        os.replace(partial, path)
        return size


def complete(path: Path, mark: Path, fingerprint: str):
    """The index entry of a finished shard with this fingerprint, or None."""
    if not (path.exists() and mark.exists()):
        return None
    try:
        entry = msgspec.json.decode(mark.read_bytes(), type=records.SceneIndex)
    except msgspec.DecodeError:
        return None
    return entry if entry.fingerprint == fingerprint and entry.bytes == path.stat().st_size else None


def write_text(out_dir: Path, scenes, encode_text) -> None:
    """text.npz: tokens float32 [scenes, L, E] and mask bool [scenes, L] of the descriptions, in the order of the index."""
    tokens, mask = encode_text([s.description for s in scenes])
    partial = out_dir / "text.tmp.npz"
    np.savez(partial, tokens=np.asarray(tokens, np.float32), mask=np.asarray(mask, bool))
    os.replace(partial, out_dir / "text.npz")


def write_metadata(out_dir: Path, scenes, latent_shape) -> None:
    """dataset_info.json and features.json, so that TFDS opens the folder."""
    import tensorflow_datasets as tfds

    infos = []
    for split in sorted({s.split for s in scenes}):
        members = [s for s in scenes if s.split == split]
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(s.timestamps_us) for s in members],
                num_bytes=sum(s.record_bytes for s in members),
                filename_template=records.filename_template(out_dir, split),
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=str(out_dir),
        features=records.make_features(latent_shape),
        split_infos=infos,
        filename_template=records.filename_template(out_dir, infos[0].name),
        check_data=False,  # the check needs TensorFlow
    )
