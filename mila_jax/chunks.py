"""Where the latents of a temporal autoencoder lie in time: a chunk of 17 frames becomes 5 latents, and chunks do not see each other.

Latent k of a chunk covers the frames up to 4k, its first one only frame 0 (Open-Sora 1.2, vae.py: 17 frames get three zero frames in front).
A latent is said to be at the last frame that it covers: camera, ego pose and time are of that frame, so the waypoint of a latent says where
the drive has got to when its frames are shown. Latents thus lie 4, 4, 4, 4 and, from chunk to chunk, 1 frame apart.

Latents are numbered from the first one of a chunk on; everything that takes numbers takes negative ones, too.
"""

import dataclasses

import numpy as np

from mila_jax.errors import UserError

FRAME_RATE = 12.0
GAP = 1.5 / FRAME_RATE  # seconds; frames farther apart than this have one missing between them


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Chunks of `frames` frames at 12 Hz that become `latents` latents."""

    frames: int
    latents: int

    @property
    def compression(self) -> int:
        """Frames of a latent but the first."""
        return (self.frames - 1) // (self.latents - 1) if self.latents > 1 else 1

    def last_frame(self, number):
        """Number of the last frame that latent `number` [...] covers."""
        chunk, inside = np.divmod(number, self.latents)
        return chunk * self.frames + inside * self.compression

    def frame_count(self, latents: int) -> int:
        """Frames that the first so many latents cover."""
        return int(self.last_frame(latents - 1)) + 1

    def latents_for(self, frames: int, given: int) -> int:
        """Fewest latents after `given` ones that end a chunk and cover at least `frames` frames more."""
        wanted = self.frame_count(given) + frames
        return -(-wanted // self.frames) * self.latents - given

    def seconds(self, number, reference=0):
        """Time of latent `number` after latent `reference`; both [...]."""
        return (self.last_frame(number) - self.last_frame(reference)) / FRAME_RATE

    def starts(self, times) -> np.ndarray:
        """First frames of the chunks in a drive with frames at `times` [n] seconds. A missing frame ends a chunk unfinished; the next one
        begins after it. What is left over is in no chunk."""
        starts, first = [], 0
        for frame in range(len(times)):
            if frame > first and times[frame] - times[frame - 1] > GAP:
                first = frame
            if frame - first == self.frames - 1:
                starts.append(first)
                first = frame + 1
        return np.array(starts, np.int64)

    def stride(self, fps: float) -> int:
        """Latents from one frame to the next of a window at `fps`: 1 at 12 Hz, else whole chunks. UserError for rates between."""
        if fps >= FRAME_RATE:
            return 1
        chunks = FRAME_RATE / self.frames / fps
        if round(chunks) < 1 or abs(chunks - round(chunks)) > 0.02 * chunks:
            rates = ", ".join(f"{FRAME_RATE / self.frames / n:.3f}" for n in (1, 2, 3))
            raise UserError(
                f"train.fps={fps:g} is no rate of latents that come in chunks of {self.frames} frames; use 12, {rates} or another whole part"
            )
        return round(chunks) * self.latents

    def rate(self, stride: int) -> float:
        """The inverse of `stride`: what the network is told as fps."""
        return FRAME_RATE if stride == 1 else FRAME_RATE * self.latents / self.frames / stride


CHUNKS = {"none": None, "frame": None, "chunk17": Chunks(17, 5)}  # autoencoder.temporal → how its latents lie; None: one a frame


def chunks_of(data: dict) -> Chunks | None:
    """How the latents of a data set lie, from its description (`prepare.describe_data`, or the index's meta)."""
    return CHUNKS[data.get("temporal", "none")]


def check_window(chunks: Chunks | None, frames: int, conditioning: int) -> None:
    """Raises `UserError` for windows that whole chunks cannot be put together from."""
    if chunks is None:
        return
    n = chunks.latents
    if frames % n or conditioning % n and conditioning != 1:
        raise UserError(
            f"window.frames={frames} and window.conditioning={conditioning} count latents, {n} for each chunk of {chunks.frames} frames: set multiples of {n}"
        )
