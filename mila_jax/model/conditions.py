"""Everything the network is told besides the noisy latents and their noise levels: one dataclass, batch first."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditions:
    """Conditions of a batch of windows (the paper's "Flexible Condition Embedding").

    text            [b, l, text_width]  token embeddings of the scene description
    text_mask       [b, l] bool         True = a real token
    waypoints       [b, t, 3]           ego pose at each frame: x forward, y left (metres), yaw (radians), relative to the ego
                                        at the last conditioning frame
    intrinsics      [b, v, t, 4]        fx, fy, cx, cy as fractions of the image's width, height, width, height
    extrinsics      [b, v, t, 7]        camera → ego: translation (metres) and quaternion (w first)
    frame_times     [b, t]              seconds relative to the last conditioning frame
    fps             [b]                 frame rate of the generated frames
    drop_text       [b] bool            True = use the learned null text
    drop_waypoints  [b] bool            True = use the learned null waypoint (a car that stands still has waypoints 0: not null)
    """

    text: jax.Array
    text_mask: jax.Array
    waypoints: jax.Array
    intrinsics: jax.Array
    extrinsics: jax.Array
    frame_times: jax.Array
    fps: jax.Array
    drop_text: jax.Array
    drop_waypoints: jax.Array

    def replace(self, **changes) -> "Conditions":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def from_clip(clip) -> Conditions:
    """Conditions of a batch of clips (the dicts of `data_pipeline.clips`, stacked): nothing dropped."""
    batch = clip["fps"].shape[0]
    keep = jnp.zeros((batch,), bool)
    names = ("text", "text_mask", "waypoints", "intrinsics", "extrinsics", "frame_times", "fps")
    return Conditions(**{n: jnp.asarray(clip[n]) for n in names}, drop_text=keep, drop_waypoints=keep)


def drop_text(conditions: Conditions) -> Conditions:
    """The same conditions without text, for guidance."""
    return conditions.replace(drop_text=jnp.ones_like(conditions.drop_text))


def drop_waypoints(conditions: Conditions) -> Conditions:
    """The same conditions without waypoints, for guidance."""
    return conditions.replace(drop_waypoints=jnp.ones_like(conditions.drop_waypoints))
