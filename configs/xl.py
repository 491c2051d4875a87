"""STDiT3-XL/2 as published (Open-Sora 1.2), for six views of 256×448 pixels and windows of 4 + 24 frames: 2,688 tokens a frame.

Command: `mila train --config=configs/xl.py --config.data.dir=DIR --config.train.dir=DIR`. 1.21 B parameters; all 973 tensors of the
published state dict have a place (`mila_jax/model/stdit3_weights.py`). Laid out for 64 chips of TPU v5p, one sample for two of them.
FLOPs per step: 567 TF a sample without recomputation, 18.1 PF for the batch of 32. Modelled by `mila plan`: 81 GiB a chip of 96, MFU 0.36
to 0.55. Nothing is measured. Latents of 4 channels and T5 tokens of width 4096, 300 of them, are what the published weights know
(autoencoder.path, autoencoder.temporal; text.encoder=t5).
"""

from configs import default


def get_config():
    """Settings of the published size."""
    c = default.get_config()
    c.simulate.height, c.simulate.width = 256, 448
    c.data.image_size = (256, 448)
    c.text.length = 300
    c.plan.latent_channels, c.plan.text_width = 4, 4096
    c.model.pred_sigma = True
    c.window.frames, c.window.conditioning = 28, 4
    c.attention.kernel = "splash"
    c.train.fps, c.train.fps_weights = (12.0, 2.0), (0.6, 0.4)  # 24 frames at 1 Hz are longer than a nuScenes scene
    c.train.batch = 32
    c.mesh.fsdp, c.mesh.context = 32, 2  # 14 frames a chip: an even number is split over the two cores of a v5p
    c.mesh.gather = "step"
    c.model.remat = "dots+attention"
    return c
