"""59 M parameters for one to eight chips: width 384, 12 pairs of blocks, 3 heads of 128, 128×224 pixels, 8-frame windows.

Command: `mila train --config=configs/small.py --config.data.dir=DIR --config.train.dir=DIR`. One TPU VM or one GPU. FLOPs per step:
1.8 TF a sample without recomputation, 58 TF for the batch of 32. Memory per chip and speed: not measured.
"""

from configs import default


def get_config():
    """Settings of the small model."""
    c = default.get_config()
    c.simulate.height, c.simulate.width = 128, 224
    c.data.image_size = (128, 224)
    c.model.width, c.model.depth, c.model.heads = 384, 12, 3
    c.model.input_sq_size = 128
    c.train.batch = 32
    c.train.learning_rate = 5e-4
    c.train.beta2 = 0.99
    return c
