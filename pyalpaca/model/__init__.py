"""The model room: a LLaMA is a function and a tree of tensors."""

from pyalpaca.model.axis import ONE_DEVICE, Axis
from pyalpaca.model.config import LlamaConfig, config_from_hf, config_from_meta, config_to_hf, config_to_meta
from pyalpaca.model.dropout import Dropout
from pyalpaca.model.llama import LayerCache, forward
from pyalpaca.model.params import Tree, flatten, init, initial, load, tree_map, unflatten, whole_slice
from pyalpaca.model.quantized import is_projection, load_quantized
from pyalpaca.model.recompute import Recompute
from pyalpaca.model.segments import Starts, attend_apart
from pyalpaca.model.sharding import (
    Parameter,
    chunk_parameters,
    cut,
    lora_parameters,
    natural_key,
    parameters,
    shard,
    stage_layers,
    stage_parameters,
)

__all__ = [
    "ONE_DEVICE",
    "Axis",
    "Dropout",
    "LayerCache",
    "LlamaConfig",
    "Parameter",
    "Recompute",
    "Starts",
    "Tree",
    "attend_apart",
    "chunk_parameters",
    "config_from_hf",
    "config_from_meta",
    "config_to_hf",
    "config_to_meta",
    "cut",
    "flatten",
    "forward",
    "init",
    "initial",
    "is_projection",
    "load",
    "load_quantized",
    "lora_parameters",
    "natural_key",
    "parameters",
    "shard",
    "stage_layers",
    "stage_parameters",
    "tree_map",
    "unflatten",
    "whole_slice",
]
