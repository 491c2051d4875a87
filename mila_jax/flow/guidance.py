"""Guidance: by conditions left out (classifier-free, each condition with its own scale), and by a weaker model (autoguidance).

With one condition: v = v_null + g (v_cond − v_null). With several, dropped one after the other (as in Open-Sora 1.3 for text and
image): v = v_0 + Σ_k g_k (v_k − v_{k−1}), where v_0 has every condition dropped, v_n none. Equal scales g give
v_0 + g (v_n − v_0), the rule for one condition. Training drops conditions independently, so every such set is known to the network.

Autoguidance (Karras et al., "Guiding a diffusion model with a bad version of itself", arXiv 2406.02507): v = v_w + g (v − v_w), where
v_w is that of a smaller or less trained network for the same conditions. What both get wrong the weaker one gets more wrong.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from mila_jax.errors import UserError


def guidance_weights(scales: Sequence[float]) -> list[float]:
    """Weight of each velocity in the sum, from "nothing dropped" to "all dropped"; they add up to 1.

    `scales[i]` belongs to the i-th drop. Entry j is for the first j drops applied.
    """
    bounds = [*[float(scale) for scale in scales], 1.0]
    return [bounds[0]] + [bounds[j] - bounds[j - 1] for j in range(1, len(bounds))]


def guided(velocity: Callable, drops: Sequence[Callable], scales: Sequence[float], *, batched: bool = True) -> Callable:
    """Wraps `velocity(latents, levels, conditions)` so that it follows its conditions more strongly; same signature.

    `drops`: functions conditions → conditions, each of which drops one condition (its learned null), e.g. text, then waypoints.
    `scales`: one Python float per drop. 1 means as trained, 0 ignores the condition. Sets of conditions with weight 0 are not
    evaluated: all scales 1 returns `velocity` itself, equal scales cost two evaluations. `batched` evaluates them in one call with
    the batch repeated (more memory), otherwise one after the other. Raises UserError when the two lists differ in length.
    """
    if len(drops) != len(scales):
        raise UserError(f"guidance needs one scale per condition: {len(drops)} conditions, {len(scales)} scales")
    weights = guidance_weights(scales)
    used = [j for j, weight in enumerate(weights) if weight != 0]
    if used == [0]:
        return velocity

    def condition_sets(conditions):
        sets = [conditions]
        for drop in drops:
            sets.append(drop(sets[-1]))
        return [sets[j] for j in used]

    def combine(velocities):
        # from the most dropped outwards, v_0 + Σ g (v_k − v_{k−1}); the weights sum to 1, so only differences are scaled
        base = velocities[-1]
        return base + sum(weights[j] * (value - base) for j, value in zip(used[:-1], velocities[:-1]))

    def guided_velocity(latents, levels, conditions):
        sets = condition_sets(conditions)
        if not batched:
            return combine([velocity(latents, levels, each) for each in sets])
        repeat = len(sets)
        together = velocity(
            jnp.concatenate([latents] * repeat),
            jnp.concatenate([levels] * repeat),
            jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *sets),
        )
        return combine(jnp.split(together, repeat))

    return guided_velocity


def autoguided(velocity: Callable, guide: Callable, scale: float) -> Callable:
    """Wraps `velocity(latents, levels, conditions)` so that it keeps away from what `guide`, a weaker model's, does; same signature.

    `scale`: g, a Python float; 1 leaves `velocity` as it is, and `guide` is not evaluated.
    """
    if scale == 1:
        return velocity

    def guided_velocity(latents, levels, conditions):
        weaker = guide(latents, levels, conditions)
        return weaker + scale * (velocity(latents, levels, conditions) - weaker)

    return guided_velocity
