"""The encoding job: every instant's six images once through the autoencoder, every scene's description once through the text
encoder. One shard per scene; a scene whose shard is complete is not encoded again.

Any number of processes, on one machine or on many, work on parts of one job: part i of n takes every n-th scene, and needs to know
nothing of the others. Whoever finds all shards complete writes the index. The output may be a bucket.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import tempfile
from pathlib import Path

import msgspec
import numpy as np
import tqdm

from data_pipeline import records
from data_pipeline.example import serialise_example
from data_pipeline.foreground import foreground_of, read_vehicles
from data_pipeline.nuscenes.check import check_files
from data_pipeline.nuscenes.reader import instants, load_image
from data_pipeline.storage import Folder, join
from mila_jax.errors import UserError

DECODE_THREADS = min(32, os.cpu_count() or 1)
POSES = ("cam2ego_translation", "cam2ego_rotation", "ego_translation", "ego_rotation")


@dataclasses.dataclass(frozen=True)
class Part:
    """Part `index` of `count` equal ones of a job."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise UserError(f"part {self.index} of {self.count}: parts are numbered 0 to {self.count - 1}")


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
    part: Part = Part(),
) -> list[str]:
    """Encodes `nusc`, or a part of it, into `out_dir` (layout: data_pipeline/records.py; a folder or an address).

    encode_images: uint8 [batch, H, W, 3] -> float32 [batch, h, w, c], posterior mean, always with the same `batch` so that it
    compiles once. encode_text: list of n strings -> tokens [n, L, E], mask bool [n, L]. latent_shift, latent_scale: numbers
    or [c]; stored latents are (mean - shift) / scale. meta: JSON-able description of the encoders (names, hashes); a change of it, of
    the sizes or of a scene's records makes the scene be encoded again. Returns the scenes that other parts have yet to encode; when
    there are none, the index has been written. Raises UserError naming the file for a missing or broken image, an unwritable
    folder, and latents of another shape than `latent_shape` or not finite.
    """
    encoder = SceneEncoder(nusc, out_dir, encode_images, make_job(latent_shape, image_size, latent_shift, latent_scale, meta), batch)
    encode_part(encoder, part, progress)
    with write_errors(out_dir):
        return finish(encoder, encode_text)


def encode_part(encoder: "SceneEncoder", part: Part, progress: bool) -> None:
    """Encodes every `part.count`-th scene from number `part.index` on; writes no index. Raises `UserError` before the first for missing images."""
    scenes = encoder.nusc.scenes
    mine = range(part.index, len(scenes), part.count)
    sizes = [len(scenes[i].tracks["CAM_FRONT"].files) for i in mine]
    with write_errors(encoder.out), tqdm.tqdm(total=sum(sizes), desc="encode", unit="instant", disable=not progress) as bar:
        encoder.out.make()
        left = (encoder.moments(i) for i in mine if encoder.finished(i) is None)
        check_files(encoder.nusc.root, (name for moments in left for moment in moments for name in moment.files), "the scenes to be encoded")
        for number, size in zip(mine, sizes):
            encoder.encode(number)
            bar.update(size)


@contextlib.contextmanager
def write_errors(out_dir):
    """Turns an OSError of the output folder into a `UserError` that names the file."""
    try:
        yield
    except OSError as error:
        where = error.filename or out_dir
        records.check_open_files(where, error)
        raise UserError(f"cannot write the encoded data set: {where}: {error.strerror or error}; choose another folder") from error


def make_job(latent_shape, image_size, latent_shift, latent_scale, meta: dict) -> dict:
    """What every shard of a data set has in common, as plain values."""
    latent_shape = tuple(int(n) for n in latent_shape)
    # One number per channel (of the pictures' latents), whichever way it was given.
    shift, scale = (np.broadcast_to(np.asarray(x, np.float32), np.shape(x) or latent_shape[-1:]) for x in (latent_shift, latent_scale))
    return {
        "format": records.FORMAT,
        "latent_shape": list(latent_shape),
        "image_size": [int(n) for n in image_size],
        "latent_shift": [float(x) for x in shift],
        "latent_scale": [float(x) for x in scale],
        "meta": meta,
    }


def finish(encoder: "SceneEncoder", encode_text) -> list[str]:
    """Writes text, TFDS metadata and, last, the index, if every shard is complete; otherwise returns the scenes that are not.

    Two parts that end at the same moment may both do it: they write the same bytes.
    """
    found = [encoder.finished(number) for number in range(len(encoder.nusc.scenes))]
    missing = [scene.name for scene, entry in zip(encoder.nusc.scenes, found) if entry is None]
    if missing:
        return missing
    write_text(encoder.out, found, encode_text)
    write_metadata(encoder.out, found, encoder.job["latent_shape"], records.has_foreground(encoder.job["meta"]))
    sizes = {key: tuple(encoder.job[key]) for key in ("latent_shape", "image_size")}
    index = records.Index(scenes=found, **{**encoder.job, **sizes})
    encoder.out.write("index.json", msgspec.json.encode(index))
    return []


class SceneEncoder:
    """Encodes scenes one by one into shards of `out_dir`."""

    def __init__(self, nusc, out_dir, encode_images, job: dict, batch: int, video=None):
        """video: a `VideoCodec` on top of the pictures' autoencoder, or None; `job["latent_shape"]` then is of its latents."""
        self.nusc, self.out, self.encode_images, self.job, self.batch, self.video = nusc, Folder(out_dir), encode_images, job, batch, video
        self.fields = records.record_fields(job["latent_shape"], records.has_foreground(job["meta"]))
        self.picture_shape = tuple(job["latent_shape"] if video is None else video.pictures.latent_shape(*job["image_size"]))
        self.shift = np.asarray(job["latent_shift"], np.float32)
        self.scale = np.asarray(job["latent_scale"], np.float32)
        counts: dict[str, int] = {}
        self.shards = []
        for scene in nusc.scenes:
            self.shards.append(records.shard_name(scene.split, counts.setdefault(scene.split, 0)))
            counts[scene.split] += 1

    def moments(self, number: int) -> list:
        """The instants of scene `number`; UserError when it has none."""
        scene = self.nusc.scenes[number]
        found = instants(scene)
        if not found:
            raise UserError(f"{self.nusc.root}: scene {scene.name!r} has no moment at which all six cameras have a frame; take it out of scene.json")
        return found

    def finished(self, number: int) -> records.SceneIndex | None:
        """The index entry of scene `number` when its shard is complete and made from the same as now would be, else None."""
        return self.complete(number, self.fingerprint(number, self.moments(number)))

    def complete(self, number: int, fingerprint: str) -> records.SceneIndex | None:
        """The index entry of scene `number` when its shard is complete and has this fingerprint, else None."""
        shard = self.shards[number]
        try:
            entry = msgspec.json.decode(self.out.read(f"{shard}.json"), type=records.SceneIndex)
            if entry.fingerprint != fingerprint or entry.bytes != self.out.size(shard):
                return None
        except (msgspec.DecodeError, FileNotFoundError):
            return None
        return msgspec.structs.replace(entry, **self.origin(number))

    def origin(self, number: int) -> dict:
        """The scene's token, by which another source is known, CAM_FRONT's times, and which are keyframes: what clip presets need."""
        scene = self.nusc.scenes[number]
        front = scene.tracks["CAM_FRONT"]
        return {"token": scene.token, "front_us": front.timestamps_us.tolist(), "keyframes": np.flatnonzero(front.key).tolist()}

    def encode(self, number: int) -> records.SceneIndex:
        """Makes the shard of scene `number` unless it is complete already; returns the scene's part of the index."""
        scene, shard, moments = self.nusc.scenes[number], self.shards[number], self.moments(number)
        fingerprint = self.fingerprint(number, moments)
        if done := self.complete(number, fingerprint):
            return done
        # From here until the mark is written again the shard counts as not there, whatever its file holds; an index that
        # knows its old content must go first.
        if self.out.exists(shard) or self.out.exists(f"{shard}.json"):
            self.out.remove("index.json")
            self.out.remove(f"{shard}.json")
        latents, foreground = self.latents(scene, moments), self.foreground(scene, moments)
        if self.video is not None:
            moments, latents, foreground = self.through_time(scene, moments, latents, foreground)
        size, record_bytes = self.write_shard(shard, number, moments, latents, foreground)
        entry = records.SceneIndex(
            name=scene.name,
            description=scene.description,
            location=scene.location,
            split=scene.split,
            shard=shard,
            bytes=size,
            record_bytes=record_bytes,
            timestamps_us=[m.timestamp_us for m in moments],
            fingerprint=fingerprint,
            **self.origin(number),
        )
        self.out.write(f"{shard}.json", msgspec.json.encode(entry))
        return entry

    @functools.cached_property
    def vehicles(self) -> dict:
        """Boxes by scene token, read when the first scene is encoded."""
        return read_vehicles(self.nusc)

    def fingerprint(self, number: int, moments) -> str:
        """A hash of everything that the shard's content depends on, but the pixels themselves."""
        scene = self.nusc.scenes[number]
        about = [self.job, number, scene.name, scene.token, scene.description, scene.location, scene.split]
        digest = hashlib.sha256(msgspec.json.encode(about, order="sorted"))
        for moment in moments:
            digest.update("\n".join(moment.files).encode())
            for field in ("timestamps_us", "intrinsics", *POSES):
                digest.update(np.ascontiguousarray(getattr(moment, field)).tobytes())
        for array in self.vehicles.get(scene.token, ()) if "foreground" in self.fields else ():
            digest.update(array.tobytes())
        return digest.hexdigest()

    def foreground(self, scene, moments) -> np.ndarray | None:
        """Where vehicles are, uint8 [n, 6, h, w], if the data set is to tell it."""
        if "foreground" not in self.fields:
            return None
        vehicles, shape = self.vehicles.get(scene.token), self.fields["foreground"][1][1:]
        return np.stack([foreground_of(vehicles, moment, shape) for moment in moments])

    def through_time(self, scene, moments, latents, foreground) -> tuple[list, np.ndarray, np.ndarray | None]:
        """(moment of each latent's last frame, temporal latents [m, 6, h, w, c'], where vehicles are in any of a latent's frames) of a scene's n
        pictures: their moments, latents [n, 6, h, w, c] and vehicles."""
        chunks = self.video.chunks
        starts = chunks.starts([moment.timestamp_us * 1e-6 for moment in moments])
        if not len(starts):
            raise UserError(
                f"scene {scene.name!r} has no {chunks.frames} frames in a row without a gap, as autoencoder.temporal={self.video.kind} needs"
            )
        frames = (starts[:, None] + np.arange(chunks.frames)).ravel()
        out = self.video.encode(latents[frames].swapaxes(0, 1)).swapaxes(0, 1).astype(np.float16)
        if not np.isfinite(out).all():
            raise UserError(f"the temporal autoencoder gives latents that are not finite for scene {scene.name!r}; check its weights")
        last = starts[:, None] + chunks.last_frame(np.arange(chunks.latents))
        if foreground is not None:
            begin = np.concatenate([[0], chunks.last_frame(np.arange(chunks.latents - 1)) + 1])
            foreground = np.concatenate([np.maximum.reduceat(foreground[i : i + chunks.frames], begin) for i in starts])
        return [moments[i] for i in last.ravel()], out, foreground

    def latents(self, scene, moments) -> np.ndarray:
        """Normalised latents [n, 6, h, w, c] of a scene's n instants: float16, or float32 where a temporal autoencoder is to take them."""
        height, width = self.job["image_size"]
        files = [join(self.nusc.root, name) for moment in moments for name in moment.files]
        out = np.empty((len(files), *self.picture_shape), np.float16 if self.video is None else np.float32)
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
                if mean.shape != (self.batch, *self.picture_shape):
                    raise UserError(
                        f"the autoencoder gives latents {mean.shape[1:]} for images {height}x{width}, but "
                        f"the expected latent shape is {self.picture_shape}; make them agree"
                    )
                out[start : start + len(ready)] = ((mean - self.shift) / self.scale)[: len(ready)]
        if not np.isfinite(out).all():
            raise UserError(f"the autoencoder gives latents that are not finite for scene {scene.name!r}; check its weights and scale")
        return out.reshape(len(moments), 6, *self.picture_shape)

    def write_shard(self, shard: str, number: int, moments, latents, foreground=None) -> tuple[int, int]:
        """Writes the records and puts the file in its place; returns the file's bytes and those of the records.

        Raises `UserError` naming the shard when the disk is full.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        with self.out.writing(shard) as partial:
            # The writer reports a missing or unwritable folder late and without its name; this does at once.
            partial.open("wb").close()
            try:
                writer = ArrayRecordWriter(str(partial), records.WRITER_OPTIONS)
                serialised = self.write_records(writer, number, moments, latents, foreground)
                writer.close()
            except RuntimeError as error:  # its own kind of OSError; most come at the end, when what is left is written
                records.check_open_files(self.out.at(shard), error)
                reason = str(error).strip().partition("\n")[0][:200]
                raise UserError(
                    f"{self.out.at(shard)} cannot be written ({reason}); make room and run the same command again, finished scenes are kept"
                ) from error
            size = partial.stat().st_size
        return size, serialised

    def write_records(self, writer, number: int, moments, latents, foreground=None) -> int:
        """Writes one record per instant; returns their bytes."""
        size = 0
        for i, moment in enumerate(moments):
            record = {
                "latents": latents[i],
                "timestamps": moment.timestamps_us,
                "intrinsics": moment.intrinsics,
                **{name: getattr(moment, name) for name in POSES},
                "scene": number,
                "instant": i,
            }
            if "foreground" in self.fields:
                record["foreground"] = foreground[i]
            data = serialise_example(record, self.fields)
            size += len(data)
            writer.write(data)
        return size


def write_text(out: Folder, scenes, encode_text) -> None:
    """text.npz: tokens [scenes, L, E] and mask bool [scenes, L] of the descriptions, in the order of the index.

    Tokens are kept as float32, or as float16 where the encoder gives that (T5's are wide).
    """
    tokens, mask = encode_text([s.description for s in scenes])
    tokens = np.asarray(tokens)
    content = io.BytesIO()
    np.savez(content, tokens=tokens if tokens.dtype == np.float16 else tokens.astype(np.float32), mask=np.asarray(mask, bool))
    out.write("text.npz", content.getvalue())


def write_metadata(out: Folder, scenes, latent_shape, foreground: bool) -> None:
    """dataset_info.json and features.json, so that TFDS opens the folder."""
    import tensorflow_datasets as tfds

    with tempfile.TemporaryDirectory(prefix="mila-") as scratch:  # TFDS writes local files one after the other
        for scene in scenes:
            (Path(scratch) / scene.shard).touch()  # it looks for their names
        infos = []
        for split in sorted({s.split for s in scenes}):
            members = [s for s in scenes if s.split == split]
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[len(s.timestamps_us) for s in members],
                    num_bytes=sum(s.record_bytes for s in members),
                    filename_template=records.filename_template(scratch, split),
                )
            )
        tfds.folder_dataset.write_metadata(
            data_dir=scratch,
            features=records.make_features(latent_shape, foreground),
            split_infos=infos,
            filename_template=records.filename_template(scratch, infos[0].name),
            check_data=False,  # the check needs TensorFlow
        )
        for path in sorted(Path(scratch).glob("*.json")):
            out.write(path.name, path.read_bytes())
