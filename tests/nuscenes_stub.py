"""A world and a renderer that cost nothing, so that the data tests need no ray caster: a car drives straight at 8 m/s, image values
tell the camera and the time."""

import numpy as np

from data_pipeline.encode import encode_dataset
from data_pipeline.nuscenes.reader import open_nuscenes
from data_pipeline.simulator.write import SimulatorConfig, simulate

HEIGHT, WIDTH = 16, 28
LATENT_SHAPE = (2, 2, 3)
SPEED = 8.0


class Car:
    """A car 8 m ahead of the ego per `index`, in the lane beside it, as fast as the ego."""

    category, size = "vehicle.car", (1.9, 4.5, 1.6)

    def __init__(self, index):
        self.index = index

    def pose(self, times):
        times = np.asarray(times)
        return np.stack([8 * self.index + SPEED * times, 0 * times, 0.8 + 0 * times], -1), 0 * times

    def attribute(self, times):
        return ["vehicle.moving"] * len(times)


class World:
    """The stub of data_pipeline.simulator.world.World; the third car is more than 60 m away."""

    night, rain, location = False, False, "boston-seaport"

    def __init__(self, seed, index, seconds):
        self.description = f"Straight road {index}"
        self.actors = [Car(1), Car(2), Car(9)]

    def ego_pose(self, times):
        times = np.asarray(times)
        return np.stack([SPEED * times, 0 * times, 0 * times], -1), np.tile([1.0, 0, 0, 0], (len(times), 1))


class Renderer:
    """Images with 20 * camera + 10 * seconds in the red channel; car 1 covers CAM_FRONT, car 2 is hidden behind it."""

    def __init__(self, world, rig, height, width):
        self.shape = (height, width)

    def render(self, times):
        times = np.asarray(times)
        image = np.zeros((len(times), 6, *self.shape, 3), np.uint8)
        image[..., 0] = np.rint(20 * np.arange(6) + 10 * times)[..., None, None]
        image[..., 1] = 128
        instance = np.zeros((len(times), 6, *self.shape), np.int32)
        instance[:, 1] = 1
        return {"image": image, "depth": np.full((len(times), 6, *self.shape), 20, np.float32), "instance": instance}


def write(root, renderer=Renderer, **changes):
    """Simulates into `root` with the stub; two scenes of 3 s unless told otherwise."""
    settings = {"scenes": 2, "seconds": 3.0, "height": HEIGHT, "width": WIDTH, "jpeg_quality": 95} | changes
    simulate(root, SimulatorConfig(**settings), progress=False, world_factory=World, renderer_factory=renderer)


def encode_images(images):
    """Means of halves of the image: uint8 [n, H, W, 3] to float32 [n, 2, 2, 3]."""
    n, height, width, _ = images.shape
    return images.reshape(n, 2, height // 2, 2, width // 2, 3).astype(np.float32).mean((2, 4))


def encode_text(texts):
    """Four tokens of width 5 that hold the text's last digit; the fourth is masked."""
    tokens = np.array([[[int(t[-1])] * 5] * 4 for t in texts], np.float32)
    return tokens, np.tile([True, True, True, False], (len(texts), 1))


def encode(root, out, version="v1.0-sim", images=encode_images, **changes):
    """Encodes the data set at `root` into `out` with the stub encoders; the scenes left to other parts."""
    settings = {
        "latent_shape": LATENT_SHAPE,
        "image_size": (HEIGHT, WIDTH),
        "latent_shift": 100.0,
        "latent_scale": 50.0,
        "batch": 7,
        "meta": {"autoencoder": "stub"},
        "progress": False,
    } | changes
    return encode_dataset(open_nuscenes(root, version), out, images, encode_text, **settings)


def tree_bytes(folder):
    """{relative path: content} of all files under `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
