"""The three training stages of the paper (supplement B), to be laid over any preset: `--config=configs/xl.py:stage1`.

Command: `mila train --config=configs/xl.py:stage1 --config.train.init_from=WEIGHTS …`, then :stage2 and :stage3, each with the last one's
model.safetensors as train.init_from. Chips, memory and FLOPs are the preset's. What the stages reach: not measured.

What the paper gives: rates, which frames are given, what is trained, about how many steps, and the 75 % of noisy anchors. Ours: which
embeddings stay frozen in stages 2 and 3, how often windows start from one frame, and how often they end in a given frame.
"""

STAGES = ("stage1", "stage2", "stage3")

# Stage 1 trains what the base model lacks or does otherwise on six views, and the way out.
NEW = ("conditions.*", "pairs.spatial.attn.*", "pairs[-1].*", "final_table", "final.*")
# Stages 2 and 3 leave the base model's embeddings of time, frame rate and text as they are.
MOST = ("patch.*", "modulation.*", "conditions.*", "pairs.*", "final_table", "final.*")


SCENE = 19.0  # seconds: windows have to lie within one of nuScenes' scenes


def rates(c, shares: tuple) -> tuple[tuple, tuple]:
    """The paper's rates with their shares, less those at which a window of this many frames is longer than a scene."""
    fit = [(fps, share) for fps, share in zip((12.0, 2.0, 1.0), shares) if (c.window.frames - c.window.conditioning) / fps <= SCENE]
    total = sum(share for _, share in fit)
    return tuple(fps for fps, _ in fit), tuple(round(share / total, 4) for _, share in fit)


def apply(c, stage: str):
    """The settings `c` with those of a stage ("" = as they are). Raises ValueError for an unknown one."""
    if not stage:
        return c
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}: use one of {', '.join(STAGES)}")
    c.train.warmup = min(c.train.warmup, 1000)
    c.train.single_frame, c.train.single_frame_anchors = 0.5, True
    if stage == "stage1":  # twelve frames at one rate, first frames included in it
        c.window.frames = c.window.conditioning + 12
        c.train.fps, c.train.fps_weights = rates(c, (0.34, 0.33, 0.33))
        c.train.conditioning_fps = "same"
        c.train.trainable, c.train.steps, c.train.anchor_rate = NEW, 2_000, 0.0
    else:  # first frames at 12 Hz whatever the rate of the others; in some cases the last frame is given as well
        c.train.fps, c.train.fps_weights = rates(c, (0.6, 0.2, 0.2))
        c.train.conditioning_fps = "both"
        c.train.trainable, c.train.steps, c.train.anchor_rate, c.train.anchor_noisy = MOST, 20_000, 0.3, 0.0
    if stage == "stage3":  # plus anchors to be corrected
        c.train.steps, c.train.anchor_rate, c.train.anchor_noisy = 8_000, 0.7, 0.75
    return c
