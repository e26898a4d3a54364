"""Evaluation: the token mean of the loss over a whole share of the data, the same in every layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pyalpaca.data import Data, ordered_batch
from pyalpaca.model import Tree, flatten, forward
from pyalpaca.parallel import Mesh, all_reduce, context_share
from pyalpaca.train.step import Setup


class Evaluation(NamedTuple):
    """loss: sum of the losses of all labels over their number (nan if there are none); tokens: that number."""

    loss: float
    tokens: int


@torch.no_grad()
def evaluate(params: Tree, data: Data, setup: Setup) -> Evaluation:
    """The loss on the first `eval_samples` samples of `data`, in their order; every rank must call it, and gets the result.

    Losses and labels are counted before they are divided, so neither short samples nor micro-batches without a label weigh
    more than they should. Data-parallel ranks take micro-batches in turn; those without one take padding, so that all
    of them do the same number of forward passes.
    """
    config, mesh = setup.config, setup.mesh
    count, rows = min(config.eval_samples or len(data), len(data)), config.micro_batch_size
    trees = setup.trees(flatten(params))
    total = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for turn in range(math.ceil(count / (rows * mesh.dp))):
        first = (turn * mesh.dp + mesh.dp_rank) * rows
        last = min(first + rows, count)
        found = ordered_batch(data, first, last, rows, config.seq_length, config.pad_to or "length")
        tokens, labels = (x.to(mesh.device) for x in found)
        tokens, labels, _ = context_share(tokens, labels, mesh, setup.axis)
        for tree in trees:
            head = partial(_loss, setup, labels)
            y = forward(tree, tokens if "embed" in tree else _receive(tree, mesh), setup.model, setup.axis, head=head)
            if "norm" in tree:
                total[0] += y
                total[1] += (labels != -100).sum()
            else:
                _send(y, mesh)
    loss, labelled = all_reduce(all_reduce(total, mesh.replica_group), mesh.pp_group).tolist()
    return Evaluation(loss / labelled if labelled else math.nan, int(labelled))


def _loss(setup: Setup, labels: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return setup.axis.head_loss(x, weight, labels, 1.0)


def _send(x: Tensor, mesh: Mesh) -> None:
    """Hand hidden states (B, S, D) to the next stage, their shape first: rows may be shorter than in training."""
    shape = torch.tensor(x.shape, device=mesh.device)
    for part in (shape, x.contiguous()):
        dist.send(part, mesh.stage_neighbour(1), mesh.pp_group)


def _receive(params: Tree, mesh: Mesh) -> Tensor:
    shape = torch.empty(3, dtype=torch.int64, device=mesh.device)
    dist.recv(shape, mesh.stage_neighbour(-1), mesh.pp_group)
    norm = next(iter(params["layers"].values()))["attention_norm"]
    x = torch.empty(shape.tolist(), dtype=norm.dtype, device=mesh.device)
    dist.recv(x, mesh.stage_neighbour(-1), mesh.pp_group)
    return x


class Best(NamedTuple):
    """The best evaluation of a run so far, and how many have passed since without a better one."""

    loss: float = math.inf
    step: int = 0
    since: int = 0


def next_best(best: Best, step: int, loss: float) -> Best:
    """The same after an evaluation; a loss that is not a number is never better."""
    return Best(loss, step, 0) if loss < best.loss else best._replace(since=best.since + 1)


def best_of(records: Sequence[Mapping[str, float]]) -> Best:
    """The best evaluation in the records of a run, so that a run that resumes knows it again."""
    best = Best()
    for record in records:
        if "valid_loss" in record:
            best = next_best(best, int(record["step"]), record["valid_loss"])
    return best
