"""DeepSpeed as the engine: ZeRO-1, -2 and -3 over the functional model, in its own process groups, saved in our own format.

DeepSpeed holds the weights, the gradients and AdamW's state; pyalpaca gives it the model as modules, the loss (a sum over the
global batch's tokens, as in `step`), the learning rate and the loss scale of each step.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyalpaca.model import ONE_DEVICE, Axis, Dropout, Recompute, Starts, Tree, flatten, forward, unflatten
from pyalpaca.parallel import all_reduce
from pyalpaca.train.deepspeed_config import deepspeed_config
from pyalpaca.train.engine import Engine
from pyalpaca.train.optimizer import OptimizerState, decays
from pyalpaca.train.schedule import learning_rate
from pyalpaca.train.step import Metrics, Setup, TrainState, advance, axis_of, judge, label_count, sample_numbers

_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
Head = Callable[[Tensor, Tensor], Tensor]
_MOMENTS = ("exp_avg", "exp_avg_sq")


class _Part(nn.Module):
    """A part of the model's tree and the forward pass through it; ZeRO-3 gathers the weights of one part at a time."""

    def __init__(self, tree: Tree, setup: Setup) -> None:
        super().__init__()
        self._setup = setup
        for path, tensor in flatten(tree).items():
            # A module's name for a parameter has no dots.
            self.register_parameter(path.replace(".", "/"), nn.Parameter(tensor, path in setup.trainable))

    def tree(self) -> Tree:
        tree = unflatten({name.replace("/", "."): p for name, p in self.named_parameters()})
        return {"layers": {}, **tree}

    def forward(self, x: Tensor, dropout: Dropout | None, axis: Axis, head: Head | None = None) -> Tensor:
        config = self._setup.config
        how, every = cast(Recompute, config.recompute), config.recompute_every
        return forward(self.tree(), x, self._setup.model, axis, recompute=how, recompute_every=every, dropout=dropout, head=head)


class _Model(nn.Module):
    """The whole model as a row of parts: embedding, layers, norm and head."""

    def __init__(self, params: Tree, setup: Setup) -> None:
        super().__init__()
        layers = [{"layers": {name: tree}} for name, tree in params["layers"].items()]
        trees = [{"embed": params["embed"]}, *layers, {"norm": params["norm"], "head": params["head"]}]
        self.parts = nn.ModuleList(_Part(tree, setup) for tree in trees)

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor, dropout: Dropout | None, axis: Axis, scale: Tensor) -> Tensor:
        """scale x the sum of the losses of all labels."""
        x = tokens_BS
        for part in self.parts:
            x = part(x, dropout, axis, lambda last, weight: axis.head_loss(last, weight, labels_BS, scale))
        return x

    def leaves(self) -> dict[str, nn.Parameter]:
        return {name.replace("/", "."): p for part in self.parts for name, p in part.named_parameters()}


def _import_deepspeed(setup: Setup) -> Any:
    if find_spec("deepspeed") is None:
        raise ValueError("engine is deepspeed, but DeepSpeed is not installed: pip install deepspeed, or give --engine native")
    os.environ.setdefault("DS_ACCELERATOR", setup.mesh.device.type)
    # It calls collectives by names that torch 2.13 has given up.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    with redirect_stdout(sys.stderr):
        deepspeed = import_module("deepspeed")  # it has no types
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def check_deepspeed(setup: Setup) -> None:
    """ValueError for settings that DeepSpeed's engine can't serve."""
    config, mesh = setup.config, setup.mesh
    if mesh.tp * mesh.cp * mesh.pp > 1:
        raise ValueError(
            f"engine deepspeed is data-parallel only, but tp is {mesh.tp}, cp {mesh.cp} and pp {mesh.pp}; set all three to 1"
        )
    if config.zero:
        raise ValueError("zero is given with engine deepspeed, whose stage stands in --deepspeed-config; leave --zero out")
    if setup.model.tie_embeddings:
        raise ValueError("the model ties its embeddings, which engine deepspeed does not know; give --engine native")
    if "RANK" not in os.environ:
        raise ValueError("engine deepspeed wants its processes from torchrun: torchrun --nproc_per_node N -m pyalpaca.train ...")


def open_deepspeed(state: TrainState, setup: Setup) -> tuple[Engine, TrainState]:
    """The engine over a state's weights and, if it has some, moments and masters; and the state without them.

    ValueError if DeepSpeed is not installed or can't serve these settings.
    """
    check_deepspeed(setup)
    config, mesh = setup.config, setup.mesh
    settings = deepspeed_config(config, mesh.dp)
    deepspeed = _import_deepspeed(setup)
    model = _Model(state.params, setup)
    leaves = model.leaves()
    learning = [p for path, p in leaves.items() if path in setup.trainable]
    groups = [
        {"params": some, "weight_decay": config.weight_decay if decayed else 0.0}
        for decayed in (True, False)
        if (some := [p for p in learning if decays(p, config) == decayed])
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    with redirect_stdout(sys.stderr):  # DeepSpeed reports on stdout, which is for our lines
        deepspeed.init_distributed(dist_backend=_BACKENDS[mesh.device.type], auto_mpi_discovery=False, verbose=False)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]
    zero = _Zero(deepspeed, engine, leaves, setup)
    zero.restore(state)
    return Engine(zero.step, zero.weights, zero.whole), replace(state, params={}, optimizer=OptimizerState({}, {}, {}))


class _Zero:
    """A DeepSpeed engine and our names for its parameters."""

    def __init__(self, deepspeed: Any, engine: Any, leaves: dict[str, nn.Parameter], setup: Setup) -> None:
        self._deepspeed, self._engine, self._leaves, self._setup = deepspeed, engine, leaves, setup
        self._learning = {path: p for path, p in leaves.items() if path in setup.trainable}
        self._sharded = engine.zero_optimization_stage() == 3
        engine.optimizer.check_grad_overflow = True  # in every dtype: what is not finite must not reach the weights

    def step(
        self, state: TrainState, tokens_NBS: Tensor, labels_NBS: Tensor, setup: Setup, starts: Starts | None = None
    ) -> tuple[TrainState, Metrics]:
        """As `train_step`, on the weights that DeepSpeed holds."""
        config, mesh, engine = setup.config, setup.mesh, self._engine
        scale, lr = state.loss_scale.value, learning_rate(state.updates + 1, config)
        engine.optimizer.loss_scaler.cur_scale = scale
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        # DeepSpeed takes the mean over ranks of gradients that are already shares of the mean over all labels.
        factor = scale * mesh.dp / label_count(labels_NBS, mesh)
        numbers_NB = sample_numbers(tokens_NBS, state.samples, mesh)
        total = torch.zeros((), device=mesh.device)
        rows = tokens_NBS.shape[1]
        for i, (tokens, labels, numbers) in enumerate(zip(tokens_NBS, labels_NBS, numbers_NB, strict=True)):
            dropout = Dropout(config.lora_dropout, config.seed, numbers) if config.lora_dropout else None
            axis = axis_of(ONE_DEVICE, starts and starts[i * rows : (i + 1) * rows])
            loss = engine(tokens, labels, dropout, axis, factor)
            total += loss.detach() / (scale * mesh.dp)
            # DeepSpeed multiplies by its loss scale, which this loss already has: its gradients are made with it.
            engine.backward(loss / scale, scale_wrt_gas=False)
            engine.step()
        total = all_reduce(total, mesh.replica_group)
        overflow = bool(engine.optimizer.overflow)
        norm = float("inf") if overflow else float(engine.get_global_grad_norm())
        finite, skip = judge(state, total.item(), norm, setup, lambda: "DeepSpeed found gradients that are not finite")
        return advance(state, finite, skip, config), Metrics(total.item(), norm, lr, scale, not finite)

    @contextmanager
    def weights(self, state: TrainState) -> Iterator[Tree]:
        with self._deepspeed.zero.GatheredParameters(list(self._leaves.values()), enabled=self._sharded):
            yield unflatten({path: p.detach() for path, p in self._leaves.items()})

    def whole(self, state: TrainState) -> TrainState:
        """Weights, moments and masters, gathered tensor by tensor; they stay on rank 0 alone, which writes them."""
        params: dict[str, Tensor] = {}
        optimizer = OptimizerState({}, {}, {})
        for path, p in self._leaves.items():
            with self._deepspeed.zero.GatheredParameters([p], enabled=self._sharded):
                self._keep(params, path, p.detach())
            if path not in self._learning:
                continue
            for kind in _MOMENTS:
                found = self._deepspeed.utils.safe_get_full_optimizer_state(p, kind)
                self._keep(getattr(optimizer, kind), path, found)
            if p.dtype != torch.float32:
                self._keep(optimizer.master, path, self._deepspeed.utils.safe_get_full_fp32_param(p))
        return replace(state, params=unflatten(params), optimizer=optimizer)

    def _keep(self, to: dict[str, Tensor], path: str, tensor: Tensor) -> None:
        if self._setup.mesh.rank == 0:
            to[path] = tensor.to("cpu", copy=True)

    def restore(self, state: TrainState) -> None:
        """Begin AdamW's state: zero, or what a checkpoint held."""
        zero = self._engine.optimizer
        flats = zero.fp32_partitioned_groups_flat if self._sharded else zero.single_partition_of_fp32_groups
        for flat in flats:
            step = torch.tensor(float(state.updates))
            zero.optimizer.state[flat] = {"step": step, **{kind: torch.zeros_like(flat) for kind in _MOMENTS}}
        if not self._sharded:
            zero._lazy_init_hp_params_optimizer_state()
        for path, p in self._learning.items():
            for kind in (*_MOMENTS, "master"):
                values: dict[str, Tensor] = getattr(state.optimizer, kind)
                if path in values:
                    self._put(p, values[path], None if kind == "master" else kind)

    def _put(self, p: Any, value: Tensor, kind: str | None) -> None:
        utils = self._deepspeed.utils
        if self._sharded:  # the whole can't be set where ranks do not divide it
            size = p.ds_tensor.numel()
            start = size * self._setup.mesh.dp_rank
            value = nn.functional.pad(value.flatten()[start : start + size], (0, max(0, start + size - value.numel())))[:size]
            put_state, put_weight = utils.safe_set_local_optimizer_state, utils.safe_set_local_fp32_param
        else:
            put_state, put_weight = utils.safe_set_full_optimizer_state, utils.safe_set_full_fp32_param
        if kind is None:
            put_weight(p, value)
        else:
            put_state(p, value, kind)
