"""The settings of a training run: one frozen record, checked before anything is loaded; `flags` fills it.

No torch here, so that `pyalpaca train --help` answers at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_AT_LEAST_ONE = (
    *("tp", "cp", "pp", "virtual_stages", "micro_batch_size", "global_batch_size", "seq_length", "steps"),
    *("keep", "log_every", "hysteresis", "loss_scale_window", "bucket_size", "recompute_every"),
)


def _setting(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run. ValueError for settings that contradict each other."""

    model: str = _setting("", "model to start from: a folder in any layout (Hugging Face, Meta, Megatron, native)")
    lora: str = _setting("", "adapters merged into the model on the way, in order: A,B")
    data: str = _setting("", "prefix of the indexed data set that preprocess_data.py wrote")
    data_type: str = _setting("instruction", "one sample a record, or text cut to seq_length", ("instruction", "text"))
    output: str = _setting("", "folder of the run: metrics.jsonl, checkpoints")
    vocab_size: int = _setting(0, "real vocabulary of a Megatron folder without config.json (0: the folder says)")

    tp: int = _setting(1, "tensor-parallel size")
    pp: int = _setting(1, "pipeline-parallel size; what tp x cp x pp leaves of the processes is data parallel")
    cp: int = _setting(1, "context-parallel size: a sequence is cut among so many processes, for long ones")
    sequence_parallel: bool = _setting(False, "cut activations between blocks along the sequence over the tensor-parallel ranks")
    schedule: str = _setting("1f1b", "order of a pipeline's work", ("1f1b", "interleaved", "zb-h1"))
    virtual_stages: int = _setting(1, "chunks of layers on each pipeline stage; 2 or more with --schedule interleaved")
    layers_per_stage: str = _setting("", "layers of each (virtual) pipeline stage, e.g. 3,5 (empty: as even as possible)")
    engine: str = _setting("native", "what holds weights and optimizer: pyalpaca or DeepSpeed", ("native", "deepspeed"))
    deepspeed_config: str = _setting("", "DeepSpeed's JSON file for --engine deepspeed; its auto is what the settings here say")
    zero: int = _setting(0, "ZeRO stage; 1: the ranks of data parallelism share the optimizer's state (2 and 3 are DeepSpeed's)")
    bucket_size: int = _setting(1 << 23, "numbers in a bucket of gradients, which travels while the backward pass runs")
    micro_batch_size: int = _setting(2, "samples in one forward pass of one device")
    global_batch_size: int = _setting(16, "samples in one step, over all devices and accumulated micro-batches")
    seq_length: int = _setting(512, "longest sample in tokens; longer ones are cut")
    pad_to: int = _setting(0, "pad to a multiple of this many tokens instead of to seq_length (0: to seq_length)")
    pack: bool = _setting(False, "put short samples together in rows of seq_length, attention apart; a batch then counts rows")
    split: str = _setting("1,0,0", "shares of the data for training, validation, test")

    steps: int = _setting(100, "optimizer steps")
    epochs: float = _setting(0.0, "passes over the training data, instead of steps (0: as many steps as --steps says)")
    lr: float = _setting(1e-4, "highest learning rate")
    min_lr: float = _setting(0.0, "learning rate at the end of the decay")
    lr_schedule: str = _setting("cosine", "decay after the warmup", ("cosine", "linear", "constant"))
    lr_decay_steps: int = _setting(0, "step at which min_lr is reached (0: the last)")
    warmup_steps: int = _setting(0, "steps of linear warmup")
    warmup_fraction: float = _setting(0.0, "the same as a share of the decay steps")
    weight_decay: float = _setting(0.01, "AdamW's decoupled weight decay")
    decay_norms: bool = _setting(False, "decay RMSNorm weights too, as the original does")
    beta1: float = _setting(0.9, "AdamW's first momentum")
    beta2: float = _setting(0.999, "AdamW's second momentum")
    eps: float = _setting(1e-8, "AdamW's epsilon")
    clip: float = _setting(1.0, "largest global gradient norm (0: no clipping)")
    seed: int = _setting(42, "of the sample order and of what is initialised")

    dtype: str = _setting("fp32", "of weights and activations; the optimizer keeps fp32 masters", ("fp32", "bf16", "fp16"))
    loss_scale: float = _setting(4096.0, "first loss scale in fp16")
    loss_scale_window: int = _setting(1000, "clean steps after which the loss scale doubles")
    hysteresis: int = _setting(2, "overflows after which the loss scale halves")
    min_loss_scale: float = _setting(1.0, "smallest loss scale")
    recompute: str = _setting(
        "none",
        "activations computed again in the backward pass: selective: what lies between matrix products; full: whole layers",
        ("none", "selective", "full"),
    )
    recompute_every: int = _setting(1, "the same only in every so-many-th layer")
    on_nan: str = _setting(
        "stop", "what a loss or gradient that is not finite does (fp16 skips until the loss scale is smallest)", ("stop", "skip")
    )

    lora_r: int = _setting(0, "train LoRA factors of this rank (0: train all weights)")
    lora_alpha: float = _setting(0.0, "LoRA scale is alpha / r (0: 2 r)")
    lora_dropout: float = _setting(0.0, "share of a projection's inputs that its LoRA factors do not get in training")
    lora_targets: str = _setting("q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "projections that get LoRA factors")
    lora_full: str = _setting("embed_tokens,lm_head", "modules trained in full beside LoRA")

    eval_every: int = _setting(0, "steps between evaluations on the validation share (0: only at the end, with the test share)")
    eval_samples: int = _setting(0, "samples of a share that an evaluation takes, from its first on (0: all)")
    patience: int = _setting(0, "evaluations in a row without a better loss after which the run stops (0: it goes on)")
    keep_best: bool = _setting(True, "keep the checkpoint of the best evaluation in OUTPUT/best, whatever --keep says")

    log_every: int = _setting(1, "steps between log lines (metrics.jsonl has every step)")
    tensorboard: str = _setting("", "also write TensorBoard's event files to this folder")
    wandb: str = _setting("", "also report to this project of Weights & Biases")
    swanlab: str = _setting("", "also report to this project of SwanLab")
    peak_tflops: float = _setting(0.0, "what HFU and MFU are shares of, per device (0: known, or measured by a matrix product)")
    count_bytes: bool = _setting(False, "record the bytes that rank 0 moves in each step, by axis and collective (this slows it)")
    save_every: int = _setting(0, "steps between checkpoints (0: only at the end)")
    save_async: bool = _setting(True, "write checkpoints beside the training, from a copy of the state in host memory")
    keep: int = _setting(2, "checkpoints kept; older ones are deleted")
    resume: bool = _setting(False, "go on from the newest checkpoint in the output folder, if there is one")
    timeout: float = _setting(30.0, "minutes after which a collective that others don't join ends the run")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{f.name} is {value!r}, expected one of {', '.join(choices)}")
            least = 1 if f.name in _AT_LEAST_ONE else 0
            if not isinstance(value, str) and not value >= least:  # so written, a NaN fails too
                raise ValueError(f"{f.name} is {value}, expected at least {least}")
        if self.zero > 1:
            raise ValueError(f"zero is {self.zero}, expected 0 or 1; ZeRO-2 and ZeRO-3 are DeepSpeed's, give --engine deepspeed")
        self._check_pipeline()
        if self.pack and self.data_type == "text":
            raise ValueError("pack is for short samples, and data_type text is cut to full ones; leave pack out")
        if self.pack and self.cp > 1:
            raise ValueError(f"pack keeps samples apart on one process, and cp {self.cp} cuts them up; give one of them")
        for name in ("beta1", "beta2", "lora_dropout"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected less than 1")
        if not 0 < self.min_loss_scale <= self.loss_scale:
            raise ValueError(
                f"min_loss_scale is {self.min_loss_scale}, expected above 0 and at most loss_scale {self.loss_scale}"
            )
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError("warmup_steps and warmup_fraction say the same thing; give one of them")
        if self.patience and not self.eval_every:
            raise ValueError("patience is given without eval_every, so nothing is evaluated on the way; give eval_every too")
        if self.recompute_every > 1 and self.recompute == "none":
            raise ValueError("recompute_every is given without recompute, so nothing is computed again; give recompute too")
        if (self.engine == "deepspeed") != bool(self.deepspeed_config):
            raise ValueError("engine deepspeed and deepspeed_config belong together; give both or neither")
        for name in ("lora_alpha", "lora_dropout"):
            if getattr(self, name) and not self.lora_r:
                raise ValueError(f"{name} is given without lora_r, so all weights would be trained; give lora_r too")

    def _check_pipeline(self) -> None:
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("sequence_parallel cuts over the tensor-parallel ranks, and tp is 1; give --tp 2 or more")
        if (self.schedule == "interleaved") != (self.virtual_stages > 1):
            raise ValueError(
                f"virtual_stages is {self.virtual_stages} with schedule {self.schedule}; interleaved wants 2 or more, others 1"
            )
        if self.schedule != "1f1b" and self.pp == 1:
            raise ValueError(f"schedule {self.schedule} is for a pipeline, and pp is 1; give --pp 2 or more")
        counts = [word.strip() for word in self.layers_per_stage.split(",")] if self.layers_per_stage else []
        if not all(word.isdecimal() for word in counts):
            raise ValueError(f"layers_per_stage is {self.layers_per_stage!r}, expected numbers of layers such as 3,5")
        if counts and len(counts) != self.pp * self.virtual_stages:
            raise ValueError(
                f"layers_per_stage has {len(counts)} numbers, expected one for each of pp x virtual_stages = "
                f"{self.pp * self.virtual_stages} stages"
            )

    @property
    def layer_counts(self) -> tuple[int, ...]:
        """layers_per_stage as numbers; none: as even as possible."""
        return tuple(int(word) for word in self.layers_per_stage.split(",") if word)

    @property
    def decay_steps(self) -> int:
        return self.lr_decay_steps or self.steps

    @property
    def warmup(self) -> int:
        """Steps of warmup."""
        return self.warmup_steps or round(self.warmup_fraction * self.decay_steps)
