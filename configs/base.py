"""0.31 B parameters for a slice of 16 chips: width 768, 16 pairs of blocks, 6 heads of 128, 256×448 pixels, windows of 4 + 12 frames.

Command: `mila train --config=configs/base.py --config.data.dir=DIR --config.train.dir=DIR`. 16 chips of TPU v5e, v5p or v6e, one sample
each. FLOPs per step: 86 TF a sample without recomputation, 1.4 PF for the batch of 16. Memory per chip and speed: not measured.
"""

from configs import default


def get_config():
    """Settings of the middle size."""
    c = default.get_config()
    c.simulate.height, c.simulate.width = 256, 448
    c.data.image_size = (256, 448)
    c.model.width, c.model.depth, c.model.heads = 768, 16, 6
    c.window.frames, c.window.conditioning = 16, 4
    c.attention.kernel = "splash"
    c.train.batch = 16
    c.mesh.fsdp = 16
    return c
