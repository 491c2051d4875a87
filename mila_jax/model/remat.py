"""What the forward pass keeps of each pair of blocks for the backward pass; the rest is computed again (`model.remat`).

From most memory to least. FLOPs are those of a training step relative to `none`, both at the sizes of configs/xl128.py on TPUs; what a
chip makes of them `mila plan` models. The unit of memory is the stream: tokens × width.

| value             | kept of each pair, besides its input                               | memory | FLOPs |
|-------------------|--------------------------------------------------------------------|--------|-------|
| none              | everything                                                         |        | 1     |
| dots+attention    | results of linear layers and of attention, the stream where it     | 25     | 1     |
|                   | changes sides and before the MLPs                                  |        |       |
| dots              | results of linear layers                                           | 22     | 1.05  |
| attention+mlp     | results of attention, hidden layers and results of the MLPs, the   | 13     | 1.12  |
|                   | stream between the two blocks                                      |        |       |
| attention+results | results of attention and of the MLPs                               | 4      | 1.20  |
| attention         | results of attention                                               | 2      | 1.28  |
| block             | nothing (`full` is another name for it)                            | 0      | 4/3   |
| offload           | nothing; the input of each pair waits in the host's memory         | 0      | 4/3   |

Memory that is left over after one of them and does not do for the next: `A:10:B` treats the first ten pairs as A, the others as B
(and so on: `A:4:B:4:C`).

Attention by XLA keeps its results, but computes its weights again in every mode but `none`. All with `attention` in their name also
keep statistics of norms and of the softmax of the splash kernel, which take next to nothing.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

from mila_jax.errors import UserError
from mila_jax.model.splash import RESIDUALS

# Names of values inside a pair (`keep`) that policies choose from. The stream is that at the beginning of a pair, at the beginning of its
# second block, and between attention and MLP; a branch is what attention or the MLP adds to it, before its gate.
STREAM, MIDDLE, INNER = "stream", "stream_middle", "stream_inner"
INPUTS, ATTENTION, BRANCH = "attention_inputs", "attention_result", "attention_branch"
HIDDEN, RESULT = "mlp_hidden", "mlp_result"
STATISTICS = "norm_statistics"


def keep(x, name: str):
    """Marks a value for the policies below; changes nothing in it."""
    return checkpoint_name(x, name)


def _linear(primitive, *operands, **parameters):
    """Whether a value is the result of a linear layer: a product without batch axes and without a precision of its own (`layers.rotate`)."""
    chosen = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *operands, **parameters)
    return chosen and parameters.get("precision") is None


def _policies() -> dict:
    p = jax.checkpoint_policies
    attention = (RESIDUALS, ATTENTION, STATISTICS)
    return {
        # All by name, after the bias: a result that is kept as the product leaves it would be written a second time with it. That of
        # attention to the text is not kept: its kernel takes less than writing and reading it.
        "dots+attention": p.save_only_these_names(*attention, INPUTS, BRANCH, MIDDLE, INNER, HIDDEN, RESULT),
        "dots": _linear,
        "attention+mlp": p.save_only_these_names(*attention, MIDDLE, HIDDEN, RESULT),
        "attention+results": p.save_only_these_names(*attention, RESULT),
        "attention": p.save_only_these_names(*attention),
        "block": p.nothing_saveable,
        "full": p.nothing_saveable,
        "offload": p.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[STREAM], offload_src="device", offload_dst="pinned_host"
        ),
    }


NAMES = ("none", *_policies())


def parts(text: str, depth: int) -> list[tuple[str, int]]:
    """`model.remat` → (name, number of pairs) in their order: `"block"` → all, `"dots:10:block"` → ten and the rest.

    Raises `UserError` for unknown names and for numbers that do not fit.
    """
    names, counts = text.split(":")[::2], text.split(":")[1::2]
    for name in names:
        if name not in NAMES:
            known = ", ".join(NAMES)
            raise UserError(f"model.remat={text!r}: {name!r} is unknown; use one of {known}, or two with a number of pairs between, block:4:none")
    if len(counts) != len(names) - 1 or not all(c.isdigit() and int(c) > 0 for c in counts):
        raise UserError(f"model.remat={text!r} is not NAME or NAME:PAIRS:NAME")
    rest = depth - sum(map(int, counts))
    if rest < 1:
        raise UserError(f"model.remat={text!r} leaves none of model.depth={depth} pairs for {names[-1]!r}; lower a number")
    return list(zip(names, [*map(int, counts), rest]))


def rematerialised(body, name: str, *, looped: bool):
    """The scan body `body` with the policy `name` of the table above; `KeyError` for a name that is not in it.

    looped: whether the scan stays a loop. Where it is unrolled the compiler would find that what is computed again has been computed.
    """
    if name == "none":
        return body
    return jax.checkpoint(body, policy=_policies()[name], prevent_cse=not looped)
