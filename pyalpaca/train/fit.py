"""A training that can't fit is refused before anything is loaded or written, with the plan's reason."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from pyalpaca.model import LlamaConfig
from pyalpaca.parallel import Mesh, gather_objects
from pyalpaca.plan import DEVICES, Job, free_memory, make_plan, reason
from pyalpaca.train.config import TrainConfig
from pyalpaca.train.deepspeed_config import deepspeed_config
from pyalpaca.train.prepare import words


def planned_job(config: TrainConfig, model: LlamaConfig, replicas: int, zero: int, bucket: int = 10**8) -> Job:
    """The job that settings describe; replicas: ranks with the same weights; zero, bucket: its stage, or DeepSpeed's."""
    return Job(
        model,
        tp=config.tp,
        cp=config.cp,
        pp=config.pp,
        dp=replicas // config.cp,
        micro_batch=config.micro_batch_size,
        global_batch=config.global_batch_size,
        seq=config.seq_length,
        sequence_parallel=config.sequence_parallel and config.tp > 1,
        dtype=config.dtype,
        recompute=config.recompute,
        recompute_every=config.recompute_every,
        zero=zero,
        bucket=bucket,
        lora_r=config.lora_r,
        lora_targets=words(config.lora_targets),
        lora_full=words(config.lora_full),
        schedule=config.schedule,
        chunks=config.virtual_stages,
        layers=config.layer_counts,
    )


def check_fits(config: TrainConfig, model: LlamaConfig, mesh: Mesh) -> None:
    """ValueError, the same on every rank, if some rank's device has not the memory that the plan says.

    On a CPU that is the memory that is free now, which the processes of this machine share. What DeepSpeed may lay off to
    other memory is not checked.
    """
    zero, bucket = config.zero, 1
    if config.engine == "deepspeed":
        section = deepspeed_config(config, mesh.dp)["zero_optimization"]
        if any(section.get(key) for key in ("offload_optimizer", "offload_param")):
            return
        zero, bucket = section["stage"], int(section.get("reduce_bucket_size", 5e8))  # DeepSpeed's own default
    found: str | None = None
    if (memory := device_memory(mesh.device, local_processes())) is not None:
        device = replace(_UNKNOWN, name="this machine" if mesh.device.type == "cpu" else "this device", memory=memory)
        plan = make_plan(planned_job(config, model, mesh.replicas, zero, bucket), device)
        found = None if plan.fits else reason(plan)
    problems = [problem for problem in gather_objects(found) if problem]
    if problems:
        raise ValueError(f"{config.model}: this training does not fit: {problems[0]}")


_UNKNOWN = replace(DEVICES["ascend910b2"], reserved=0.0)
"""A device of which only the memory counts."""


def device_memory(device: torch.device, processes: int) -> float | None:
    """Bytes that one of so many processes of this machine may have of the device; None where that is not known."""
    if device.type == "npu":
        import torch_npu

        return float(torch_npu.npu.mem_get_info(device)[0])
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = free_memory()
    return None if free is None else free / processes


def local_processes() -> int:
    """How many processes torchrun has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
