"""configs/xl.py with 9 heads of 128 instead of 16 of 72, and 120 text tokens: the same width and depth, to be trained from scratch.

Command: `mila train --config=configs/xl128.py --config.data.dir=DIR --config.train.dir=DIR`. TPUs compute attention in lanes of 128: a
head of 72 costs as much as one of 128, so that nine of these are 1.8 times cheaper (modelled) at the same FLOPs. 64 chips of TPU v5p.
FLOPs per step: 556 TF a sample without recomputation, 17.8 PF for the batch of 32. Modelled by `mila plan` on v5p:4x4x4: 16 samples with
mesh.fsdp=16, mesh.context=4 take 34 GiB a chip of 96, MFU 0.55 to 0.75. Nothing is measured.
"""

from configs import xl


def get_config():
    """Settings of the published size with wide heads."""
    c = xl.get_config()
    c.text.length = 120
    c.model.heads = 9
    c.model.pred_sigma = False
    c.attention.temporal = c.attention.text = "fused"
    return c
