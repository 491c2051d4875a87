"""The camera rig: where the six cameras sit on the car, how wide they see, and when each fires.

The numbers in `rig.json` are the calibration of one real nuScenes car; the file's note says which.
"""

import dataclasses
import json
import pathlib

import numpy as np

from mila_jax import geometry
from mila_jax.errors import UserError
from mila_jax.views import VIEWS

RIG_FILE = pathlib.Path(__file__).with_name("rig.json")


@dataclasses.dataclass(frozen=True)
class Rig:
    """Six calibrated cameras, all arrays in the order of `names`.

    names: the view names in the order of `mila_jax.views.VIEWS`.
    intrinsics: [6, 4] fx/W, fy/H, cx/W, cy/H (fractions of the image size, so they hold for every resolution).
    translation: [6, 3] camera centre in the ego frame, metres. quaternion: [6, 4] camera to ego, w first.
    offset_seconds: [6] firing time of each camera relative to CAM_FRONT.
    """

    names: tuple[str, ...]
    intrinsics: np.ndarray
    translation: np.ndarray
    quaternion: np.ndarray
    offset_seconds: np.ndarray

    def cam2ego(self) -> np.ndarray:
        """Homogeneous camera-to-ego transforms [6, 4, 4]."""
        return geometry.transform(self.translation, self.quaternion)

    def horizontal_fov(self) -> np.ndarray:
        """Horizontal field of view of each camera [6] in radians (principal point taken into account)."""
        fx, cx = self.intrinsics[:, 0], self.intrinsics[:, 2]
        return np.arctan(cx / fx) + np.arctan((1 - cx) / fx)


def load_rig(path=RIG_FILE) -> Rig:
    """Reads a rig from a JSON file laid out like `rig.json`; `UserError` when the file or a camera is missing."""
    try:
        document = json.loads(pathlib.Path(path).read_text())
        width, height = document["image_size"]
        cameras = [document["cameras"][name] for name in VIEWS]
        k = np.array([c["intrinsic"] for c in cameras], np.float64)
        matrices = np.array([c["cam2ego"] for c in cameras], np.float64)
        offsets = np.array([c["offset_ms"] for c in cameras], np.float64) / 1000
    except OSError as error:
        raise UserError(f"{path}: cannot read the camera rig ({error.strerror}); give a readable rig file") from None
    except KeyError as error:
        raise UserError(f"{path}: the camera rig lacks {error}; it needs image_size and all six cameras") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a camera rig ({error}); compare it with {RIG_FILE.name}") from None
    intrinsics = np.stack([k[:, 0, 0] / width, k[:, 1, 1] / height, k[:, 0, 2] / width, k[:, 1, 2] / height], -1)
    return Rig(VIEWS, intrinsics, matrices[:, :3, 3], geometry.quaternion(matrices[:, :3, :3]), offsets)
