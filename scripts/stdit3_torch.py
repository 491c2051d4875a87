"""STDiT3 (one view, no new embeddings) in plain PyTorch: what scripts/benchmark_cpu.py runs beside our backbone.

Written for the benchmark from the same equations, the way one writes such a model in PyTorch: fused attention, layer norm, RMS
norm and GELU of `torch.nn.functional`, views instead of copies where PyTorch allows them, tables computed once. Modules carry the
published names, so that `mila_jax.model.stdit3_weights.save` gives a state dict that loads here.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def tensor(array):
    """A tensor of its own of a NumPy array."""
    return torch.from_numpy(array.copy())


class Attention(nn.Module):
    """Self-attention over the middle axis of [n, tokens, d]."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))

    def forward(self, x, rotary=None):
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each [n, k, tokens, e]
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class CrossAttention(nn.Module):
    """Attention of [b, tokens, d] to text [b, l, d]."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x, text):
        b, length = text.shape[:2]
        q = self.q_linear(x).view(b, x.shape[1], self.heads, -1).transpose(1, 2)
        k, v = self.kv_linear(text).view(b, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, inputs, hidden, outputs):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """A spatial or temporal block on [b, t, n, d]."""

    def __init__(self, width, heads, temporal):
        super().__init__()
        self.temporal = temporal
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))
        self.attn, self.cross_attn, self.mlp = Attention(width, heads), CrossAttention(width, heads), MLP(width, 4 * width, width)

    def forward(self, x, text, mod, rotary):
        b, t, n, d = x.shape
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (mod + self.scale_shift_table)[:, :, None].unbind(3)
        y = F.layer_norm(x, (d,), eps=1e-6) * (1 + scale_a) + shift_a
        if self.temporal:
            y = self.attn(y.transpose(1, 2).reshape(b * n, t, d), rotary).view(b, n, t, d).transpose(1, 2)
        else:
            y = self.attn(y.view(b * t, n, d)).view(b, t, n, d)
        x = x + gate_a * y
        x = x + self.cross_attn(x.view(b, t * n, d), text).view(x.shape)
        y = F.layer_norm(x, (d,), eps=1e-6) * (1 + scale_m) + shift_m
        return x + gate_m * self.mlp(y)


class Embedder(nn.Module):
    """MLP of a sinusoidal embedding, cosines first."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("frequencies", torch.exp(-math.log(1e4) * torch.arange(128) / 128), persistent=False)

    def forward(self, t):
        angles = t[..., None] * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class Patches(nn.Module):
    """Convolution with kernel = stride: [b, c, t, h, w] to tokens [b, t, n, d]."""

    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv3d(channels, width, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(3).permute(0, 2, 3, 1)


class Text(nn.Module):
    """Text tokens to the width."""

    def __init__(self, text_width, length, width):
        super().__init__()
        self.y_proj = MLP(text_width, width, width)
        self.register_buffer("y_embedding", torch.zeros(length, text_width))

    def forward(self, y):
        return self.y_proj(y)


class Final(nn.Module):
    """Modulated norm and the linear map to patches."""

    def __init__(self, width, outputs):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.linear = nn.Linear(width, outputs)

    def forward(self, x, time):
        shift, scale = (time[:, :, None] + self.scale_shift_table)[:, :, :, None].unbind(2)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class STDiT3(nn.Module):
    """The whole network; sizes of a `mila_jax.model.dit.DiTConfig` with one view, and of its latents [frames, rows, columns]."""

    def __init__(self, config, grid):
        super().__init__()
        d, (self.pt, self.ph, self.pw) = config.width, config.patch
        self.channels = config.out_channels * (2 if config.pred_sigma else 1)
        self.x_embedder = Patches(config.in_channels, d, config.patch)
        self.t_embedder, self.fps_embedder = Embedder(d), Embedder(d)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.y_embedder = Text(config.text_width, config.text_length, d)
        self.spatial_blocks = nn.ModuleList(Block(d, config.heads, False) for _ in range(config.depth))
        self.temporal_blocks = nn.ModuleList(Block(d, config.heads, True) for _ in range(config.depth))
        self.final_layer = Final(d, self.pt * self.ph * self.pw * self.channels)
        self.grid = grid[0] // self.pt, grid[1] // self.ph, grid[2] // self.pw
        self.register_buffer("positions", position_table(*self.grid[1:], config), persistent=False)
        cos, sin = rotary_tables(self.grid[0], d // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x, timesteps, fps, y):
        """x [b, c, t, h, w], timesteps [b, t], fps [b], text y [b, l, text_width] → [b, out, t, h, w]."""
        x = self.x_embedder(x) + self.positions
        time = self.t_embedder(timesteps[:, :: self.pt]) + self.fps_embedder(fps)[:, None]
        mod = self.t_block(time).unflatten(-1, (6, -1))
        text = self.y_embedder(y)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks):
            x = temporal(spatial(x, text, mod, None), text, mod, (self.cos, self.sin))
        x = self.final_layer(x, time)
        (t, h, w), b = self.grid, len(x)
        x = x.view(b, t, h, w, self.pt, self.ph, self.pw, self.channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(b, self.channels, t * self.pt, h * self.ph, w * self.pw)


def rotate(x, tables):
    """Rotary embedding of x [n, k, t, e] by interleaved pairs."""
    cos, sin = tables
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def rotary_tables(frames, head_width):
    """Cosine and sine [frames, head_width / 2]."""
    angles = torch.arange(frames)[:, None] * 1e4 ** (-2 * torch.arange(head_width // 2) / head_width)
    return angles.cos(), angles.sin()


def position_table(rows, columns, config):
    """Sine-cosine table [rows · columns, width]: columns in the first half of the channels, rows in the second."""
    base, width = round(math.sqrt(rows * columns)), config.width
    scale = math.sqrt(config.image_size[0] * config.image_size[1]) / config.input_sq_size
    inverse = 1e4 ** (-2 * torch.arange(width // 4) / (width // 2))

    def encode(count):
        angles = (torch.arange(count) / scale * (base / count))[:, None] * inverse
        return torch.cat([angles.sin(), angles.cos()], -1)

    column = encode(columns)[None].expand(rows, -1, -1)
    row = encode(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([column, row], -1).reshape(rows * columns, width)
