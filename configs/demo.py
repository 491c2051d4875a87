"""`mila demo`: a minute of six-view video by the embedded model of configs/tiny.py, on a street that it has never seen.

Command: `bash scripts/demo.sh`; 8 minutes on two CPU cores, once everything is installed. The simulated scenes have another seed than
those that the shipped weights were trained on. With `--train`, a model is trained from random weights on three of four scenes instead:
enough to see how it goes, not to see streets (time not measured).
"""

from configs import tiny


def get_config():
    """Settings of the demo."""
    c = tiny.get_config()
    c.simulate.scenes, c.simulate.val_scenes = 4, 1
    c.simulate.seed = 7
    c.train.steps = 600
    c.train.warmup = 100
    c.train.checkpoint_every = 100
    c.train.eval_every = 200
    c.train.eval_batches = 1
    c.train.eval_picture = False  # the report shows the video itself
    c.train.ema = 0.99
    return c
