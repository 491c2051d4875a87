"""The embedded model: 64×112 pixels a view, 28 tokens a view, windows of 4 + 6 frames; the weights in mila_jax/weights are of this.

Command: `mila train --config=configs/tiny.py --config.data.dir=DIR --config.train.dir=DIR`. One machine: two CPU cores, one TPU
chip or one GPU. Trained parameters, speed and what it reaches: see mila_jax/weights/MODEL_CARD.md. TPU figures: not measured.
"""

from configs import default


def get_config():
    """Settings of the embedded model."""
    c = default.get_config()
    c.simulate.height, c.simulate.width = 64, 112
    c.data.image_size = (64, 112)
    c.text.length = 16
    c.model.width, c.model.depth, c.model.heads = 128, 6, 4
    c.model.input_sq_size = 64
    c.model.ray_rotary = True
    c.model.precondition = "motion"
    c.model.sweep, c.model.evidence, c.model.mixture = 9, True, True
    c.model.detail = 64
    c.model.dtype, c.model.remat = "float32", "none"
    # From four frames: 83 ms of two tell too little of how fast other cars go.
    c.window.frames, c.window.conditioning = 10, 4
    # α by `mila ablate` on half of its scenes; a = 0.25 was as good as what it chose (MODEL_CARD.md).
    c.window.tpd_strength, c.window.anchor_error = 0.75, 0.25
    c.train.batch = 4
    c.train.optimizer = "muon"
    c.train.learning_rate = 1.5e-3
    c.train.fps, c.train.fps_weights = (12.0, 2.0), (0.4, 0.6)  # what generation uses; anchors are the harder part
    c.train.warmup = 200
    c.train.single_frame = 0.2
    c.train.context_rate = 0.4
    c.train.beta2 = 0.99
    c.train.decay = True
    c.train.checkpoint_every = 250
    c.train.eval_every = 500
    c.generate.steps = 12
    return c
