"""1.27 B parameters as a wide, short model for TPU v6e: width 2048, 9 pairs of blocks, 16 heads of 128.

Command: `mila train --config=configs/v6e.py --config.data.dir=DIR --config.train.dir=DIR`. v6e's matrix units are 256 wide: by the TPU
compiler's own cycle estimates the four linear layers of a block reach .63 of its peak at width 1152, .79 at 1536 and .88 at 2048
(modelled). 64 chips of TPU v6e. FLOPs per step: 527 TF a sample without recomputation, 16.9 PF for the batch of 32. Modelled by
`mila plan` on v6e:8x8 (16 samples, mesh.fsdp=16, mesh.context=4, model.remat=dots+attention): 23 GiB a chip of 31, MFU 0.35 to 0.64.
Nothing is measured; whether nine wide pairs learn as well as 28 narrow ones is not either.
"""

from configs import xl128


def get_config():
    """Settings of the wide model."""
    c = xl128.get_config()
    c.model.width, c.model.depth, c.model.heads = 2048, 9, 16
    c.model.remat = "block"
    return c
