"""Rectified flow: noise levels, re-noising of anchors, guidance, the window sampler and long rollouts.

Pure functions over arrays. The network comes in as `velocity(latents, levels, conditions) -> velocity` with latents
`[B, V, T, h, w, c]` and levels `[B, V, T]` (0 clean, 1 noise); `conditions` is any pytree whose leaves lead with the batch.
Reading order: rectified_flow → timeshift → schedules → anchors → masks → guidance → sampler → plan → rollout.
"""
