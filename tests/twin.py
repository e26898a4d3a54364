"""A model's twin in transformers, to compare with."""

from __future__ import annotations

import torch

from pyalpaca.model import LlamaConfig, Tree, config_to_hf, flatten, parameters


def transformers_twin(config: LlamaConfig, params: Tree):
    """transformers' LlamaForCausalLM with the same weights, fp32, in evaluation mode."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(HFConfig(**config_to_hf(config, "float32"), attn_implementation="eager")).eval()
    paths = {p.path: p.name for p in parameters(config)}
    with torch.no_grad():
        for path, value in flatten(params).items():
            model.get_parameter(paths[path]).copy_(value)
    return model
