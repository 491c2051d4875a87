"""The world model's backbone: Open-Sora 1.2's STDiT3 with joint multi-view spatial attention and MiLA's conditions.

With one view and without the new embeddings it is exactly STDiT3 (hpcaitech/Open-Sora, branch opensora/v1.2,
opensora/models/stdit/stdit3.py), whose published weights load (`mila_jax.model.stdit3_weights`). What MiLA adds (arXiv:2503.15875):
noise levels per frame and view, spatial attention over the patches of all views (eq. (3)), and camera, waypoint and frame-time
embeddings summed onto the patch embedding (eqs. (1), (2)), whose last layers start at zero, so that the first step of a warm
start equals the base model.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from mila_jax.errors import UserError
from mila_jax.model.attention import KERNELS, SPATIAL, TEMPORAL, TEMPORAL_KERNELS, TEXT_KERNELS, CrossAttention, SelfAttention
from mila_jax.model.conditions import Conditions
from mila_jax.model.cpu_gradients import for_one_cpu
from mila_jax.model.detail import Detail
from mila_jax.model.gather import gathered
from mila_jax.model.motion import camera_rays
from mila_jax.model.norms import layer_norm, modulated_norm
from mila_jax.model.remat import BRANCH, INNER, MIDDLE, RESULT, STREAM, keep, parts, rematerialised
from mila_jax.parallel.logical import constrain
from mila_jax.model.layers import (
    MLP, Linear, fourier, gated, gelu_tanh, normal, parameter, position_table, ray_rotary_tables, rotary_tables,
    rotation_matrix, time_table, xavier, zeros,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes and switches of the backbone; the names of Open-Sora's config where it has them."""

    width: int = 1152
    depth: int = 28  # pairs of a spatial and a temporal block
    heads: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)  # frames, rows, columns
    in_channels: int = 4
    out_channels: int = 4  # of the velocity
    sweep: int = 0  # of the in_channels, corridors of a preconditioned network (mila_jax/model/precondition.py),
    evidence: bool = False  # and whether which of them is right is told (mila_jax/model/evidence.py)
    mixture: int = 0  # guesses of the sweep that it weighs at each place, in outputs of their own behind the others
    detail: int = 0  # channels of convolutions at every place of the latents (mila_jax/model/detail.py); 0 = none
    text_width: int = 4096
    text_length: int = 300
    mlp_ratio: float = 4.0
    image_size: tuple[int, int] = (224, 400)  # pixels (height, width); scales the position table only
    input_sq_size: int = 512
    pred_sigma: bool = True  # published weights carry a second half of output channels that rectified flow never uses
    qk_norm: bool = True
    new_embeddings: bool = True  # camera, waypoint and frame-time embeddings
    fourier_bands: int = 8
    ray_rotary: bool = False  # rotary embedding of the viewing direction in spatial attention (ours; published weights have none)
    dtype: str = "float32"  # compute type
    remat: str = "none"  # what is kept for the backward pass: mila_jax/model/remat.py
    attention_kernel: str = "xla"  # xla | splash, of spatial attention
    temporal_kernel: str = "xla"  # xla | fused, of temporal attention
    text_kernel: str = "xla"  # xla | fused, of attention to the text
    unroll: int | None = None  # pairs in one iteration of the scan over them; None: all of a short stack, one of a deep one

    def check(self) -> None:
        """Raises `UserError` with the config key for sizes that cannot work."""
        for key in ("width", "depth", "heads"):
            if getattr(self, key) < 1:
                raise UserError(f"model.{key}={getattr(self, key)} must be at least 1")
        if self.detail < 0:
            raise UserError(f"model.detail={self.detail} must be a number of channels, or 0 for none")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"model.dtype={self.dtype!r} is unknown; use float32 or bfloat16")
        if self.width % self.heads:
            raise UserError(f"model.width={self.width} is not a multiple of model.heads={self.heads}; change one of them")
        if (self.width // self.heads) % 2:
            raise UserError(f"model.width/model.heads={self.width // self.heads} must be even (rotary pairs); change model.heads")
        if self.width % 4:
            raise UserError(f"model.width={self.width} must be a multiple of 4 (position table); change model.width")
        if self.attention_kernel not in KERNELS:
            raise UserError(f"attention.kernel={self.attention_kernel!r} is unknown; use one of {', '.join(KERNELS)}")
        if self.temporal_kernel not in TEMPORAL_KERNELS:
            raise UserError(f"attention.temporal={self.temporal_kernel!r} is unknown; use one of {', '.join(TEMPORAL_KERNELS)}")
        if self.temporal_kernel == "fused" and (not self.qk_norm or (self.width // self.heads) % 128):
            raise UserError(f"attention.temporal=fused needs model.qk_norm and model.width/model.heads={self.width // self.heads} a multiple of 128")
        if self.text_kernel not in TEXT_KERNELS:
            raise UserError(f"attention.text={self.text_kernel!r} is unknown; use one of {', '.join(TEXT_KERNELS)}")
        if self.text_kernel == "fused" and (self.width // self.heads) % 128:
            raise UserError(f"attention.text=fused needs model.width/model.heads={self.width // self.heads} a multiple of 128")
        parts(self.remat, self.depth)


# Logical axes of the stream [b, t, v, n, d] between a block's parts. Frames stand before views: all tokens of a frame, which spatial
# attention sees as one sequence, lie together, and so do the frames that come from one device when frames and places change sides.
STREAM_SPATIAL = ("batch", "frames", None, None, None)
STREAM_TEMPORAL = ("batch", "temporal_frames", None, "places", None)


class Block(nnx.Module):
    """One STDiT3 block: modulated self-attention, text cross-attention, modulated MLP; adaLN-single modulation per frame.

    Axes of `mod`: [b, t, v, 6, d] in the order shift, scale, gate of the attention, then of the MLP.
    """

    def __init__(self, config: DiTConfig, temporal: bool, *, rngs: nnx.Rngs):
        d, last = config.width, zeros if temporal else xavier  # temporal blocks start as identity, as published
        self.temporal = temporal
        self.table = parameter(rngs, (6, d), normal(d**-0.5), (None, "embed"))
        layout, kernel = (TEMPORAL, config.temporal_kernel) if temporal else (SPATIAL, config.attention_kernel)
        self.attn = SelfAttention(d, config.heads, qk_norm=config.qk_norm, layout=layout, kernel=kernel, rngs=rngs, last=last)
        self.cross = CrossAttention(d, config.heads, kernel=config.text_kernel, rngs=rngs, last=last)
        self.mlp = MLP(d, int(d * config.mlp_ratio), d, rngs=rngs, activation=gelu_tanh, last=last, feature_axis="embed")

    def __call__(self, x, text, text_mask, mod, rotary):
        """x [b, t, v, n, d], text [b, l, d] → [b, t, v, n, d]; rotary: tables over the axis that is attended to, or None."""
        v, axes = x.shape[2], STREAM_TEMPORAL if self.temporal else STREAM_SPATIAL
        mod = constrain((mod + self.table[...]).astype(x.dtype), *axes[:3], None, None)[..., None, :, :]  # [b, t, v, 1, 6, d]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (mod[..., i, :] for i in range(6))
        # Frames are independent in spatial attention, places in temporal attention: what is split over `context` where, and so
        # which collectives lie between the two, is the mode's rules (parallel/logical.py). Everything between two matrices is
        # stated, since a statement holds for the gradient too: left to itself, the compiler moves MLP activations and attention
        # weights between devices in the backward pass instead of gathering the kernels (tests/test_parallel_modes.py counts).
        x = constrain(x, *axes)
        x = keep(x, MIDDLE) if self.temporal else x
        y = constrain(modulated_norm(x, shift_a, scale_a), *axes)
        if self.temporal and self.attn.fused:
            y = self.attn.over_frames(y, rotary)
        elif self.temporal:
            y = rearrange(self.attn(rearrange(y, "b t v n d -> b v n t d"), rotary), "b v n t d -> b t v n d")
        else:
            y = rearrange(self.attn(rearrange(y, "b t v n d -> b t (v n) d"), rotary), "b t (v n) d -> b t v n d", v=v)
        x = constrain(gated(x, gate_a, keep(constrain(y, *axes), BRANCH)), *axes)
        x = keep(constrain(x + self.cross(x, text, text_mask, axes), *axes), INNER)
        y = constrain(modulated_norm(x, shift_m, scale_m), *axes)
        return constrain(gated(x, gate_m, keep(constrain(self.mlp(y, axes), *axes), RESULT)), *axes)


class Pair(nnx.Module):
    """A spatial block and the temporal block after it: the unit that is stacked and scanned."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.spatial = Block(config, False, rngs=rngs)
        self.temporal = Block(config, True, rngs=rngs)

    def __call__(self, x, text, text_mask, mod, rays, rotary):
        x = self.spatial(x, text, text_mask, mod, rays)
        return self.temporal(x, text, text_mask, mod, rotary)


class ConditionEmbeddings(nnx.Module):
    """e_k = MLP_k(Fourier(k)) for camera, waypoint and frame time, summed (the paper's eqs. (1), (2)); zero at the start."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        d, features = config.width, 2 * config.fourier_bands + 1
        self.bands = config.fourier_bands
        self.camera = MLP(16 * features, d, d, rngs=rngs, last=zeros)
        self.waypoint = MLP(4 * features, d, d, rngs=rngs, last=zeros)
        self.frame_time = MLP(features, d, d, rngs=rngs, last=zeros)
        self.null_waypoint = parameter(rngs, (d,), zeros, ("embed",))

    def __call__(self, c: Conditions, dtype):
        """Returns [b, t, v, d]."""
        # Rotation matrices, not quaternions, enter the network: q and -q are the same camera.
        rotation = rotation_matrix(c.extrinsics[..., 3:]).reshape(c.extrinsics.shape[:-1] + (9,))
        camera = jnp.concatenate(
            [
                fourier(c.intrinsics, 8.0, 0.1, self.bands),
                fourier(c.extrinsics[..., :3], 16.0, 0.25, self.bands),
                fourier(rotation, 4.0, 0.25, self.bands),
            ],
            -1,
        )
        yaw = c.waypoints[..., 2]
        turn = jnp.stack([jnp.sin(yaw), jnp.cos(yaw)], -1)
        waypoint = jnp.concatenate([fourier(c.waypoints[..., :2], 200.0, 0.5, self.bands), fourier(turn, 4.0, 0.05, self.bands)], -1)
        time = fourier(c.frame_times[..., None], 32.0, 0.1, self.bands)
        waypoint = self.waypoint(waypoint.astype(dtype))
        waypoint = jnp.where(c.drop_waypoints[:, None, None], self.null_waypoint[...].astype(dtype), waypoint)
        return jnp.swapaxes(self.camera(camera.astype(dtype)), 1, 2) + (waypoint + self.frame_time(time.astype(dtype)))[:, :, None]


class TextEmbedding(nnx.Module):
    """Projects text tokens to the width; the null text is a learned table (published: a frozen buffer `y_embedding`)."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.null = parameter(rngs, (config.text_length, config.text_width), normal(config.text_width**-0.5), (None, None))
        self.proj = MLP(config.text_width, config.width, config.width, rngs=rngs, activation=gelu_tanh)

    def __call__(self, text, drop, dtype):
        """text [b, l, text_width], drop [b] bool → [b, l, d]. The token mask is not changed by dropping, as published."""
        text = jnp.where(drop[:, None, None], self.null[: text.shape[1]], text)
        return self.proj(text.astype(dtype))


class DiT(nnx.Module):
    """The backbone. `DiT(config, rngs=nnx.Rngs(0))`; stateless, so it is used functionally (nnx.split, plain jax.jit)."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        config.check()
        d, patch = config.width, config.patch[0] * config.patch[1] * config.patch[2]
        outputs = config.out_channels * (2 if config.pred_sigma else 1)
        self.config = config
        # A convolution with kernel = stride is a linear map of the patch vector (channel, frame, row, column).
        self.patch = Linear(config.in_channels * patch, d, (None, "embed"), rngs=rngs)
        self.time = MLP(256, d, d, rngs=rngs, first=normal(0.02), last=normal(0.02))
        self.fps = MLP(256, d, d, rngs=rngs, first=normal(0.02), last=zeros)
        self.modulation = Linear(d, 6 * d, ("embed", "mlp"), rngs=rngs)
        self.text = TextEmbedding(config, rngs=rngs)
        self.conditions = ConditionEmbeddings(config, rngs=rngs) if config.new_embeddings else None
        make = nnx.vmap(lambda r: Pair(config, rngs=r), in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        self.pairs = make(rngs.split(config.depth))
        self.final_table = parameter(rngs, (2, d), normal(d**-0.5), (None, "embed"))
        self.final = Linear(d, patch * outputs, ("embed", None), rngs=rngs)
        if config.mixture:  # of the way out, too, so that whatever trains that trains both; nothing at the start
            self.final.mixture = Linear(d, patch * config.mixture, ("embed", None), rngs=rngs, init=zeros)
        if config.detail:
            self.final.detail = Detail(config.in_channels, config.detail, d, config.patch, outputs + config.mixture, rngs=rngs)

    def __call__(self, x, timesteps, conditions: Conditions):
        """x [b, v, t, h, w, c], timesteps [b, v, t] in 0..1000 (0 = clean frame) → [b, v, t, h, w, out] float32.

        `out` is out_channels, or twice that with pred_sigma, and `mixture` more. Frames, rows and columns are zero-padded up to the patch size
        and cropped afterwards; with a temporal patch, a token takes the timestep of its first frame.
        """
        cfg = self.config
        dtype = jnp.dtype(cfg.dtype)
        b, v, t, h, w, _ = x.shape
        pt, ph, pw = cfg.patch
        pad = [(0, 0), (0, 0), (0, -t % pt), (0, -h % ph), (0, -w % pw), (0, 0)]
        seen = jnp.pad(x, pad)
        x = rearrange(seen, "b v (t pt) (h ph) (w pw) c -> b t v h w (c pt ph pw)", pt=pt, ph=ph, pw=pw)
        rows, columns = x.shape[3:5]
        per_frame = ("batch", None, None, None)  # embeddings [b, t, v, d] are small: whole, so that both kinds of block find theirs
        # Stated at both ends of the network: left to itself, the CPU partitioner drops part of the sum over `context` in the
        # gradients of the first and the last kernel (jax 0.10; tests/test_train.py compares meshes).
        x = constrain(rearrange(x.astype(dtype), "b t v h w p -> b t v (h w) p"), *STREAM_SPATIAL)
        x = constrain(self.patch(x), *STREAM_SPATIAL)
        if cfg.detail:
            features, more = self.final.detail.look(seen.astype(dtype))
            x = constrain(x + more, *STREAM_SPATIAL)
        x = x + position_table(rows, columns, cfg.width, cfg.image_size, cfg.input_sq_size).astype(dtype)
        if self.conditions is not None:
            x = x + constrain(self.conditions(conditions, dtype), *per_frame)[:, ::pt, :, None, :]

        fps = self.fps(time_table(conditions.fps))[:, None, None]  # [b, 1, 1, d]
        timesteps = jnp.swapaxes(timesteps[:, :, ::pt], 1, 2)
        time = constrain(self.time(time_table(timesteps)) + fps, *per_frame)  # [b, t, v, d], float32
        mod = constrain(self.modulation(nnx.silu(time).astype(dtype)), *per_frame)
        mod = mod.reshape(mod.shape[:-1] + (6, cfg.width))
        text = constrain(self.text(conditions.text, conditions.drop_text, dtype), "batch", None, None)
        rotary = rotary_tables(x.shape[1], cfg.width // cfg.heads)
        rays = None
        if cfg.ray_rotary:
            looks = camera_rays(conditions.intrinsics[:, :, ::pt], conditions.extrinsics[:, :, ::pt], rows, columns)
            looks = rearrange(looks, "b v t h w i -> b t (v h w) i")
            rays = ray_rotary_tables(constrain(looks, "batch", "frames", None, None), columns, cfg.width // cfg.heads)
            if for_one_cpu():  # whose compiler would compute cosines again in every block and for every head, but not through a product
                rays = tuple(table @ jnp.eye(table.shape[-1]) for table in rays)

        def body(x, pair):
            x = keep(x, STREAM)
            return pair(x, text, conditions.text_mask, mod, rays, rotary).astype(dtype), None

        # Unrolled, a short stack runs faster on a CPU; a deep one would take the compiler many minutes.
        unroll = cfg.unroll or (cfg.depth if cfg.depth <= (12 if for_one_cpu() else 8) else 1)
        pairs, first = gathered(self.pairs, dtype), 0
        for name, count in parts(cfg.remat, cfg.depth):
            some = pairs if count == cfg.depth else jax.tree.map(lambda p, a=first, b=first + count: p[a:b], pairs)
            x, _ = jax.lax.scan(rematerialised(body, name, looped=unroll < count), x, some, unroll=min(unroll, count))
            first += count

        shift = (self.final_table[0] + time)[..., None, :]  # no activation, no linear map here, as published
        scale = (self.final_table[1] + time)[..., None, :]
        x = layer_norm(x).astype(jnp.float32) * (1 + scale) + shift
        x = constrain(x.astype(dtype), *STREAM_SPATIAL)
        heads = [self.final(x), self.final.mixture(x)] if cfg.mixture else [self.final(x)]
        heads = [constrain(y, *STREAM_SPATIAL).astype(jnp.float32) for y in heads]
        heads = [rearrange(y, "b t v (h w) (pt ph pw c) -> b v (t pt) (h ph) (w pw) c", h=rows, w=columns, pt=pt, ph=ph, pw=pw) for y in heads]
        out = jnp.concatenate(heads, -1)
        if cfg.detail:
            out = out + self.final.detail(features, x).astype(jnp.float32)
        return out[:, :, :t, :h, :w]
