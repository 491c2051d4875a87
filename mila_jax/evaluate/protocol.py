"""The protocol of a score: what has to be equal before two numbers may be compared, printed and stored with every one of them.

And the scores themselves, with sanity values beside them: what equal distributions give at this number of clips (halves of the real ones, that share no scene),
and what a broken video gives (the real frames shuffled in time, or the first one repeated).
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mila_jax.errors import UserError
from mila_jax.evaluate import frechet


@dataclasses.dataclass(frozen=True)
class Card:
    """frames: in a scored clip; first: number of the first one of them, 0 being the first given frame; given: frames that the model was given;
    views: front or multi; real: where the real frames come from; clips: their list's name, clips_sha256: its hash; window: seconds after the last given
    frame ("" for the whole clip); network_sha256: "" for scores without a network."""

    score: str
    network: str
    network_sha256: str
    preprocessing: str
    views: str
    frames: int
    first: int
    given: int
    fps: float
    image_size: tuple[int, int]
    real: str
    n_real: int
    n_fake: int
    clips: str
    clips_sha256: str
    seed: int
    window: str = ""

    def __post_init__(self):
        object.__setattr__(self, "image_size", tuple(self.image_size))  # JSON has lists

    def text(self) -> str:
        """The card in two lines."""
        last = self.first + self.frames - 1
        weights = f" (SHA-256 {self.network_sha256[:12]})" if self.network_sha256 else ""
        window = f" ({self.window} s)" if self.window else ""
        return (
            f"{self.score} {self.views}: {self.network}{weights}, {self.preprocessing}; frames {self.first} to {last}{window} of "
            f"{self.image_size[0]}×{self.image_size[1]} at {self.fps:g} Hz, {self.given} given;\n"
            f"{self.n_fake} generated against {self.n_real} real ({self.real}); clips {self.clips} (SHA-256 {self.clips_sha256[:12]}), seed {self.seed}"
        )

    def differences(self, other: "Card") -> list[str]:
        """Names of the fields in which two cards differ so that their scores cannot be compared; the seed alone may differ."""
        mine, yours = ({k: tuple(v) if isinstance(v, list) else v for k, v in dataclasses.asdict(card).items()} for card in (self, other))
        return [key for key in mine if key != "seed" and mine[key] != yours[key]]

    def json(self) -> str:
        """One line of JSON; `Card(**json.loads(line))` is the card again."""
        return json.dumps(dataclasses.asdict(self))


def window(frames: int, given: int, fps: float, start: float, stop: float, first: int | None = None) -> tuple[int, int]:
    """First frame and number of frames of a clip that "`start` to `stop` seconds" means: start < t <= stop seconds after the last given frame.

    frames: of the clip, the given ones included; first: the first frame that the protocol scores, None for the first generated one (where it scores
    the last given frame, at 0 s, a window from 0 on holds that as well). Raises `UserError` for a window that ends after the clip or holds no frame.
    """
    numbers = np.arange(frames)
    times = (numbers - (given - 1)) / fps
    # A rounding error of 1/fps must not move a frame over an edge.
    later = times > (start + 1e-6 if start > 0 else -1e-6)
    inside = np.flatnonzero((numbers >= (given if first is None else first)) & later & (times <= stop + 1e-6))
    end = (frames - given + 1) / fps
    if not len(inside) or stop > end + 1e-6:
        raise UserError(
            f"the window of {start:g} to {stop:g} s holds no frames or ends after the clip, which has {end:g} s at {fps:g} Hz; choose another"
        )
    return int(inside[0]), len(inside)


def parse_windows(text: str) -> list[tuple[float, float]]:
    """Windows (start, stop) in seconds of an option such as `0-4,4-8`. Raises `UserError` for anything else."""
    found = []
    for part in text.split(","):
        try:
            start, stop = map(float, part.split("-"))
        except ValueError:
            raise UserError(f"--windows={text}: {part!r} is not START-STOP in seconds; write for example --windows=0-4,4-8") from None
        if not 0 <= start < stop < np.inf:
            raise UserError(f"--windows={text}: {part!r} must run from 0 or later to a later second")
        found.append((start, stop))
    return found


class Parts(Sequence):
    """Features that are read from where they lie whenever they are asked for: `load(item)` gives those of one clip, [n, d]."""

    def __init__(self, load: Callable, items: Sequence):
        self.load, self.items = load, items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return Parts(self.load, self.items[index]) if isinstance(index, slice) else self.load(self.items[index])


def disturbed(frames, seed: int) -> dict:
    """Broken versions of a real clip uint8 [v, t, H, W, 3]: `shuffled` in time, and `frozen` (its first frame repeated)."""
    order = np.random.default_rng(seed).permutation(frames.shape[1])
    return {"shuffled": frames[:, order], "frozen": np.repeat(frames[:, :1], frames.shape[1], 1)}


class Statistics:
    """Mean and covariance of features that come in parts, in float64; the parts are not kept."""

    def __init__(self):
        self.count, self.mean, self.scatter = 0, 0.0, 0.0

    def add(self, features) -> "Statistics":
        """Takes in features [n, d], n >= 1; exact, whatever the parts."""
        features = np.asarray(features, np.float64)
        part = Statistics()
        part.count, part.mean = len(features), features.mean(0)
        part.scatter = (features - part.mean).T @ (features - part.mean)
        return self.merge(part)

    def merge(self, other: "Statistics") -> "Statistics":
        """Takes in what another one, of other hosts or clips, has seen (Chan, Golub and LeVeque 1979)."""
        total = self.count + other.count
        if total:
            gap = other.mean - self.mean
            self.scatter = self.scatter + other.scatter + np.multiply.outer(gap, gap) * (self.count * other.count / total)
            self.mean = self.mean + gap * (other.count / total)
            self.count = total
        return self

    def gaussian(self):
        """(mean [d], unbiased covariance [d, d]). Raises ValueError for fewer than two samples."""
        if self.count < 2:
            raise ValueError("statistics of fewer than two samples")
        return self.mean, self.scatter / (self.count - 1)


def distance(real: Iterable, fake: Iterable) -> float:
    """Fréchet distance of two sets of features that come clip by clip, [n, d] each; memory is of one clip's and of the covariances."""
    sides = []
    for parts in (real, fake):
        statistics = Statistics()
        for features in parts:
            statistics.add(features)
        sides += statistics.gaussian()
    return frechet.frechet_distance_of_gaussians(*sides)


def kernel_distance(real: Sequence, fake: Sequence, *, subset: int = 1000, subsets: int = 20, seed: int = 0) -> float:
    """Kernel distance (KID, or MMD of video features) with the cubic kernel, mean over random subsets; unbiased at any number of clips.

    real, fake: features [n, d] of each clip; only those that a subset holds are kept in memory."""
    counts = [sum(map(len, side)) for side in (real, fake)]
    size = min(subset, *counts)
    rng = np.random.default_rng(seed)
    draws = [[rng.choice(n, size, replace=False) for n in counts] for _ in range(subsets if size < max(counts) else 1)]
    sides = [_rows(side, np.unique(np.concatenate([draw[i] for draw in draws]))) for i, side in enumerate((real, fake))]
    values = []
    for draw in draws:
        drawn = (rows[np.searchsorted(numbers, d)].astype(np.float64) for (numbers, rows), d in zip(sides, draw))
        values.append(frechet.kernel_distance(*drawn))
    return float(np.mean(values))


def _rows(parts: Sequence, numbers) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, their rows) of the parts put one below the other; numbers ascending."""
    kept, first = [], 0
    for part in parts:
        inside = numbers[(numbers >= first) & (numbers < first + len(part))] - first
        kept.append(np.asarray(part)[inside])
        first += len(part)
    return numbers, np.concatenate(kept)


def halves(scenes: Sequence[str]) -> tuple[list[int], list[int]]:
    """Numbers of the clips of some scenes, and of the others, about as many; where one scene has most of them, of the earlier and the later clips.

    scenes: of each clip. Clips of one scene overlap, so that halves which share scenes would hold the same pictures."""
    sides = [], []
    for scene in dict.fromkeys(scenes):  # each to the side that has fewer
        sides[len(sides[0]) > len(sides[1])].extend(i for i, other in enumerate(scenes) if other == scene)
    if 3 * min(map(len, sides)) < len(scenes):
        middle = len(scenes) // 2
        return list(range(middle)), list(range(middle, len(scenes)))
    return sides


def chosen(parts: Sequence, numbers: Sequence[int]) -> Parts:
    """The features of some clips, read when they are asked for."""
    return Parts(parts.__getitem__, numbers)


def score(real: Sequence, fake: Sequence, broken: dict | None = None, scenes: Sequence[str] | None = None) -> dict:
    """One row: the distance of generated to real features and its sanity values.

    real, fake: features [n, d] of each clip; broken: name → the same for broken versions of the real clips (`disturbed`); scenes: of each real
    clip (None: all of one). Each of the `halves` has about half as many clips and a distance that is biased upwards the more.
    """
    row = {"distance": distance(real, fake), "kernel distance": kernel_distance(real, fake)}
    sides = [chosen(real, numbers) for numbers in halves(scenes or [""] * len(real))]
    if all(sum(map(len, side)) > 1 for side in sides):
        row["real halves"] = distance(*sides)
    for name, features in (broken or {}).items():
        row[f"real {name}"] = distance(real, features)
    return row
