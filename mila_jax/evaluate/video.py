"""Writes videos (H.264 mp4, which browsers play) and contact sheets of the six views; reads videos back.

Six views are laid out as the car sees them: the front row over the back row (`mila_jax.views.GRID`). Frames are encoded one by
one, so a long video never lies in memory twice. Every file is written beside its place and renamed when complete, so a broken
run leaves no half file.
"""

import contextlib
import fractions
import os
import pathlib

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mila_jax.errors import UserError
from mila_jax.views import GRID, VIEWS, view_index


@contextlib.contextmanager
def atomic_path(path):
    """Gives a temporary path beside `path` (same suffix) to write to, and renames it to `path` at the end.

    Makes missing folders. On an error the temporary file is removed and `path` stays as it was. Raises `UserError` if the
    place cannot be written.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb"):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another output path") from error
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); free some disk space or choose another path") from error
    finally:
        temporary.unlink(missing_ok=True)


def _url(path) -> str:
    """A file as FFmpeg wants it: without the protocol, it would take what stands before a colon in the name for one."""
    return f"file:{path}"


def _scaled(image, scale):
    """PIL image enlarged by `scale` (bicubic); sizes rounded to whole pixels."""
    if scale == 1:
        return image
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC)


def _label(image, text):
    """Small white text on a dark box, in the upper left corner."""
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=max(9, image.height // 14))
    box = draw.textbbox((3, 2), text, font=font)
    draw.rectangle((0, 0, box[2] + 3, box[3] + 2), fill=(0, 0, 0))
    draw.text((3, 2), text, fill=(255, 255, 255), font=font)


def six_view_picture(views, scale=1.0, labels=False):
    """One picture of the six views, laid out as `GRID`.

    views: uint8 [6, H, W, 3] in the order of `VIEWS`. scale: enlargement. labels: write each camera's name into its picture.
    Returns uint8 [2·H·scale, 3·W·scale, 3].
    """
    views = np.asarray(views)
    if views.dtype != np.uint8 or views.ndim != 4 or views.shape[0] != len(VIEWS) or views.shape[-1] != 3:
        raise ValueError(f"expected uint8 views [{len(VIEWS)}, H, W, 3], got {views.dtype} {views.shape}")
    rows = []
    for names in GRID:
        row = []
        for name in names:
            tile = _scaled(Image.fromarray(views[view_index(name)]), scale)
            if labels:
                _label(tile, name.removeprefix("CAM_").replace("_", " ").lower())
            row.append(np.asarray(tile))
        rows.append(np.concatenate(row, 1))
    return np.concatenate(rows, 0)


@contextlib.contextmanager
def view_writer(path, fps, scale=1.0, crf=18):
    """Gives a function that adds one frame, uint8 [H, W, 3], to a video; the file is there when the block has ended. Equal frames give equal files.

    path: .mp4 file. Odd sizes are filled up to even ones, as the codec needs. fps: frames per second. scale: enlargement. crf: H.264
    quality, lower is better. Raises `UserError` if the path cannot be written or there are no frames.
    """
    count = 0
    try:
        with atomic_path(path) as temporary, av.open(_url(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=fractions.Fraction(fps).limit_denominator(10000))
            stream.pix_fmt = "yuv420p"
            # With AVX-512, x264's macroblock tree depends on what lay in memory before: equal frames would give unequal files.
            stream.options = {"crf": str(crf), "preset": "veryfast", "mbtree": "0"}

            def add(frame):
                nonlocal count
                picture = np.asarray(_scaled(Image.fromarray(np.ascontiguousarray(frame)), scale))
                picture = np.pad(picture, ((0, picture.shape[0] % 2), (0, picture.shape[1] % 2), (0, 0)), "edge")
                if not count:
                    stream.height, stream.width = picture.shape[:2]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
                count += 1

            yield add
            if not count:
                raise UserError(f"{path}: the video would have no frames; ask for a positive length")
            container.mux(stream.encode())
    except av.error.FFmpegError as error:
        raise UserError(f"{path}: the video could not be written ({error}); run `mila doctor` to check the H.264 encoder") from error


def write_view(path, frames, fps, scale=1.0, crf=18):
    """Writes one video of `frames`, an iterable of (or array) uint8 [H, W, 3]; the rest as in `view_writer`. Returns their number."""
    count = 0
    with view_writer(path, fps, scale, crf) as add:
        for count, frame in enumerate(frames, 1):
            add(frame)
    return count


def write_six_views(path, frames, fps, scale=1.0, labels=True, crf=18):
    """Writes the six views as one video, front row over back row.

    frames: array uint8 [t, 6, H, W, 3] or an iterable of [6, H, W, 3] in the order of `VIEWS`; the rest as in `write_view`.
    """
    return write_view(path, (six_view_picture(views, scale, labels) for views in frames), fps, crf=crf)


def read_video(path):
    """Whole video into memory: uint8 [t, H, W, 3] and frames per second (float). Raises `UserError` if it cannot be read."""
    try:
        with av.open(_url(path)) as container:
            rate = float(container.streams.video[0].average_rate)
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate
    except (av.error.FFmpegError, OSError, IndexError, ValueError) as error:
        raise UserError(f"{path}: not a readable video ({error}); check the path") from error


def write_png(path, image):
    """Writes uint8 [H, W, 3] as PNG, whole or not at all. Raises `UserError` if the path cannot be written."""
    with atomic_path(path) as temporary:
        Image.fromarray(np.asarray(image)).save(temporary, format="PNG", optimize=True)


def contact_sheet(path, frames, times, scale=1.0, title="", columns=2):
    """PNG of all six views at several points in time.

    frames: uint8 [k, 6, H, W, 3]; times: [k] seconds, written above each block; title: above all; columns: blocks side by
    side. Returns the picture, uint8. Raises `UserError` if the path cannot be written.
    """
    if len(frames) != len(times) or not len(frames):
        raise ValueError(f"{len(frames)} frames and {len(times)} times; need the same number, at least one")
    blocks = [six_view_picture(views, scale) for views in frames]
    height, width = blocks[0].shape[:2]
    columns = min(columns, len(blocks))
    rows = -(-len(blocks) // columns)
    gap, strip, head = 8, 18, 26 if title else 4
    sheet = Image.new("RGB", (columns * (width + gap) + gap, head + rows * (height + strip + gap)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((gap, 4), title, fill=(0, 0, 0), font=ImageFont.load_default(size=15))
    for index, (block, time) in enumerate(zip(blocks, times, strict=True)):
        x, y = gap + (index % columns) * (width + gap), head + (index // columns) * (height + strip + gap)
        draw.text((x, y), f"t = {time:.2f} s", fill=(0, 0, 0), font=ImageFont.load_default(size=12))
        sheet.paste(Image.fromarray(block), (x, y + strip))
    write_png(path, np.asarray(sheet))
    return np.asarray(sheet)
