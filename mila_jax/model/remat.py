"""What the forward pass keeps of each pair of blocks for the backward pass; the rest is computed again (`model.remat`).

From most memory to least. FLOPs are those of the matrix products of a training step relative to `none`, counted at the sizes of
configs/xl.py; what a chip makes of them `mila plan` models.

| value          | kept of each pair, besides its input                               | FLOPs |
|----------------|--------------------------------------------------------------------|-------|
| none           | everything                                                         | 1     |
| dots+attention | results of linear layers, of attention and its softmax statistics, |       |
|                | the stream between the two blocks                                  | 1     |
| dots           | results of linear layers                                           | ~1.06 |
| attention+mlp  | results of attention, hidden layers of the MLPs, the stream        |       |
|                | between the two blocks                                             | ~1.2  |
| attention      | results of attention and its softmax statistics                    | ~1.27 |
| block          | nothing (`full` is another name for it)                            | 4/3   |
| offload        | nothing; the input of each pair waits in the host's memory         | 4/3   |

Softmax statistics are kept by the splash kernel only; attention by XLA computes its weights again in every mode but `none`.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

from mila_jax.model.splash import RESIDUALS

# Names of values inside a pair (`keep`) that policies choose from.
STREAM, MIDDLE, INPUTS, ATTENTION, HIDDEN = "stream", "stream_middle", "attention_inputs", "attention_result", "mlp_hidden"


def keep(x, name: str):
    """Marks a value for the policies below; changes nothing in it."""
    return checkpoint_name(x, name)


def _linear(primitive, *operands, **parameters):
    """Whether a value is the result of a linear layer: a product without batch axes and without a precision of its own (`layers.rotate`)."""
    chosen = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *operands, **parameters)
    return chosen and parameters.get("precision") is None


def _policies() -> dict:
    p = jax.checkpoint_policies
    attention = p.save_only_these_names(RESIDUALS, ATTENTION)
    return {
        # q, k and v with their bias, so that it is not added again; the stream where it changes sides, so that no collective runs again.
        "dots+attention": p.save_from_both_policies(_linear, p.save_only_these_names(RESIDUALS, ATTENTION, INPUTS, MIDDLE)),
        "dots": _linear,
        "attention+mlp": p.save_only_these_names(RESIDUALS, ATTENTION, HIDDEN, MIDDLE),
        "attention": attention,
        "block": p.nothing_saveable,
        "full": p.nothing_saveable,
        "offload": p.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[STREAM], offload_src="device", offload_dst="pinned_host"
        ),
    }


NAMES = ("none", *_policies())


def rematerialised(body, name: str):
    """The scan body `body` with the policy `name` of the table above; `KeyError` for a name that is not in it."""
    if name == "none":
        return body
    return jax.checkpoint(body, policy=_policies()[name], prevent_cse=False)
