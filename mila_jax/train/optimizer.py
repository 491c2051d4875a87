"""AdamW with warm-up and clipping, as a function of the config's `train` section."""

import optax


def learning_rate(train):
    """Schedule step → learning rate: linear warm-up lr·(s+1)/(W+1) as in Open-Sora, then constant, or cosine to lr/20 with `decay`."""
    after = optax.constant_schedule(train.learning_rate)
    if train.decay:
        after = optax.cosine_decay_schedule(train.learning_rate, max(train.steps - train.warmup, 1), alpha=0.05)
    first = train.learning_rate / (train.warmup + 1)
    return optax.join_schedules([optax.linear_schedule(first, train.learning_rate, train.warmup), after], [train.warmup])


def make_optimizer(train) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (β₁ 0.9). Moments are float32 like the parameters."""
    adam = optax.adamw(learning_rate(train), b1=0.9, b2=train.beta2, eps=train.epsilon, weight_decay=train.weight_decay)
    return optax.chain(optax.clip_by_global_norm(train.clip), adam)
