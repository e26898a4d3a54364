"""A contestant in its own process: builds its model, then trains as many steps as it is told, and reports."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyalpaca.bench.train.cases import CONTESTANTS, Contestant, Scale, model_config
from pyalpaca.checkpoint import memory_reader
from pyalpaca.model import config_to_hf, flatten, init, parameters
from pyalpaca.ops import reuse_memory
from pyalpaca.parallel import init_mesh
from pyalpaca.train import TrainConfig
from pyalpaca.train.loop import plan, start
from pyalpaca.train.step import train_step

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LEARNING_RATE, _DECAY, _CLIP = 1e-4, 0.01, 1.0

Step = Callable[[Tensor, Tensor], float]
"""tokens, labels (B, S) -> the loss of one step, AdamW and clipping included."""


def _weights(scale: Scale, dtype: torch.dtype) -> dict[str, Tensor]:
    """The first weights of every contestant, by transformers' names, in the type that trains: a step takes more than loading."""
    config = model_config(scale)
    whole = flatten(init(parameters(config), seed=7))
    return {p.name: whole.pop(p.path).to(dtype) for p in parameters(config)}


def ours(scale: Scale, who: Contestant) -> tuple[Step, int, int]:
    """Our step, and which of the data-parallel shares of a batch it takes."""
    # One sequence in a micro-batch fills a pipeline soonest; without one, whole batches are one micro-batch each.
    micro = 1 if who.pp > 1 else scale.batch
    config = TrainConfig(
        tp=who.tp,
        pp=who.pp,
        micro_batch_size=micro,
        global_batch_size=scale.batch * who.batches,
        seq_length=scale.seq_length,
        lr=_LEARNING_RATE,
        lr_schedule="constant",
        weight_decay=_DECAY,
        clip=_CLIP,
        decay_norms=True,
        dtype=who.dtype,
        recompute=who.recompute,
    )
    reuse_memory()  # as the train command does
    mesh = init_mesh(who.tp, who.pp)
    setup = plan(model_config(scale), config, mesh)
    state = start(config, setup, memory_reader(model_config(scale), _weights(scale, _DTYPES[who.dtype])))

    def step(tokens: Tensor, labels: Tensor) -> float:
        nonlocal state
        state, metrics = train_step(state, tokens.unflatten(0, (-1, micro)), labels.unflatten(0, (-1, micro)), setup)
        return metrics.loss

    return step, mesh.dp_rank, mesh.dp


def peer(scale: Scale, who: Contestant) -> tuple[Step, int, int]:
    """The step of transformers' model with torch's fused AdamW, as its Trainer does it."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    settings: dict[str, Any] = config_to_hf(model_config(scale), "float32") | {"attn_implementation": "sdpa", "use_cache": False}
    model: Any = LlamaForCausalLM(HFConfig(**settings))
    model.to(_DTYPES[who.dtype]).load_state_dict(_weights(scale, _DTYPES[who.dtype]))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=_DECAY, fused=True)
    called = torch.compile(model) if who.compiled else model

    def step(tokens: Tensor, labels: Tensor) -> float:
        loss = called(input_ids=tokens, labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step, 0, 1


def main() -> None:
    """Answer each line that holds a number with one of JSON, once that many steps are done; end with the input."""
    # Whatever the work prints must not be taken for an answer.
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)
        scale, who = Scale(**json.loads(sys.argv[1])), CONTESTANTS[sys.argv[2]]
        torch.set_num_threads(int(sys.argv[3]))
        step, share, shares = {"ours": ours, "peer": peer}[who.module](scale, who)
        generator = torch.Generator().manual_seed(1)
        rows = scale.batch * who.batches
        print("ready", file=answer, flush=True)
        for line in sys.stdin:
            seconds, losses = [], []
            for _ in range(int(line)):
                text = torch.randint(scale.vocab_size, (rows, scale.seq_length + 1), generator=generator)
                tokens, labels = (x.contiguous().chunk(shares)[share] for x in (text[:, :-1], text[:, 1:]))
                began = time.perf_counter()
                losses.append(step(tokens, labels))
                seconds.append(time.perf_counter() - began)
            print(json.dumps({"seconds": seconds, "losses": losses}), file=answer, flush=True)


if __name__ == "__main__":
    main()
