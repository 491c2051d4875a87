"""`mila demo`: the embedded model of configs/tiny.py, sized so that the whole job fits into ten minutes on two CPU cores.

Command: `bash scripts/demo.sh`. The simulated scenes have another seed than those that the shipped weights were trained on, so
every street in the report is new to the model; a short training goes on from the shipped weights on three of them, the video
is generated on the fourth.
"""

from configs import tiny


def get_config():
    """Settings of the demo."""
    c = tiny.get_config()
    c.simulate.scenes, c.simulate.val_scenes = 4, 1
    c.simulate.seconds = 13.0
    c.simulate.seed = 7
    c.train.steps = 60
    c.train.learning_rate = 5e-5  # the shipped weights are an average over 1,000 steps; a few larger steps would only add noise
    c.train.warmup = 10
    c.train.checkpoint_every = 30
    c.train.log_every = 5
    c.train.eval_every = 60
    c.train.eval_batches = 1
    c.train.eval_picture = False  # the report shows the video itself
    c.train.ema = 0.95
    return c
