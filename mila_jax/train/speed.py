"""How fast a run is, in numbers that compare: step time, tokens and model FLOP/s, and their share of the chips' peak."""

import dataclasses

import jax

from mila_jax.parallel.aot.chips import CHIPS, chip_name
from mila_jax.parallel.aot.flops import model_flops
from mila_jax.parallel.aot.sizes import Sizes
from mila_jax.views import VIEWS


def peak_flops(device) -> float | None:
    """bf16 FLOP/s of a device, None for kinds whose peak is not in mila_jax/parallel/aot/chips.py (CPUs, GPUs)."""
    name = chip_name(device.device_kind)
    return CHIPS[name].peak if name else None


@dataclasses.dataclass(frozen=True)
class Speed:
    """tokens: patches of all views of all frames of a batch; flops: of the model for one step, forward and backward, without what is computed
    again (`parallel.aot.flops`, held against the traced program by tests), None where parameters are frozen, since that counts a whole backward
    pass; devices; peak: FLOP/s of one of them or None."""

    tokens: int
    flops: float | None
    devices: int
    peak: float | None

    @classmethod
    def of(cls, trainer) -> "Speed":
        """Of a `Trainer`'s run."""
        config = trainer.config
        sizes = Sizes("train", trainer.data, trainer.dit, dict(trainer.mesh.shape), config.train.batch, 1, config.window.frames)
        frames = -(-config.window.frames // trainer.dit.patch[0])
        tokens = config.train.batch * len(VIEWS) * frames * sizes.tokens
        flops = model_flops(sizes) if tuple(config.train.trainable) == ("*",) else None
        return cls(tokens, flops, trainer.mesh.size, peak_flops(jax.devices()[0]))

    def metrics(self, seconds: float) -> dict:
        """For a step that took `seconds`; the share of the peak (MFU) only where the peak is known."""
        out = {"speed/step_seconds": seconds, "speed/tokens_per_second": self.tokens / seconds}
        if self.flops is None:
            return out
        out["speed/model_tflops_per_second"] = self.flops / seconds / 1e12
        if self.peak:
            out["speed/mfu"] = self.flops / seconds / (self.devices * self.peak)
        return out
