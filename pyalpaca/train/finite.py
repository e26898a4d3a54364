"""What to say of a step whose loss or gradient is not finite: the first tensor, in the order of the forward pass."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pyalpaca.model import Parameter, Tree, flatten
from pyalpaca.parallel import gather_objects

_FORWARD = (
    *("embed_tokens", "input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("post_attention_layernorm", "gate_proj", "up_proj", "down_proj", "norm", "lm_head"),
)

Place = tuple[int, int, str]


def forward_place(name: str) -> Place:
    """What sorts canonical names as the forward pass meets them."""
    parts = name.removeprefix("model.").split(".")
    layer = int(parts[1]) if parts[0] == "layers" else -1 if parts[0] == "embed_tokens" else 1 << 30
    return layer, next(i for i, module in enumerate(_FORWARD) if module in parts), name


def first_bad(params: Tree, grads: Mapping[str, Tensor], table: Mapping[str, Parameter]) -> str:
    """Which tensor of which rank is not finite, in words; every rank must call it, and hears the same.

    A weight is looked for first: it spoils every gradient. Where all weights are finite, the gradients that are not are those
    from the first one named, which the backward pass reaches last, to the last one named, which it meets first.
    """

    def bad(values: Mapping[str, Tensor]) -> set[Place]:
        return {forward_place(table[path].name) for path, t in values.items() if not t.isfinite().all()}

    found = gather_objects((bad(flatten(params)), bad(grads), {table[path].name for path in grads}))
    weights, gradients = (sorted(set().union(*(each[i] for each in found))) for i in (0, 1))
    if weights:
        return f"the first tensor that is not finite is the weight {weights[0][2]}"
    if not gradients:
        return "every gradient is finite, but not their norm"
    number, total = len(gradients), len(set().union(*(each[2] for each in found)))
    return (
        f"the first tensor that is not finite is the gradient of {gradients[0][2]} ({number} of {total} gradients are so, "
        f"the last that of {gradients[-1][2]})"
    )
