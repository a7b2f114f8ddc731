"""Low-rank additions to the matrices of F (LoRA, Hu et al. 2021, arXiv 2106.09685), by the library peft.

While they are there they alone of F train; merged at the end of training they leave a model like any other.
"""

import importlib.util
import math

import torch

from newllm.errors import UserError

RANKS = ((16e9, 4), (24e9, 8), (math.inf, 16))  # below this many bytes of device memory: rank
SCALE = 2  # of the additions' product, usual in the field


def require_peft():
    """Refuse what needs the library where it is not.

    Raises:
        UserError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            "context_adapter 'lora' needs the package peft: pip install newllm[lora], or leave it out."
        )


def adapter_rank(config, memory):
    """The setting, or by the device's memory in bytes."""
    return config.adapter_rank or next(rank for limit, rank in RANKS if memory < limit)


def has_adapter(state):
    """Whether the names of a state dict are those of a model with an adapter."""
    return any(".lora_A." in name for name in state)


def saved_rank(state):
    """Rank of the adapter in a state dict."""
    return next(tensor.shape[0] for name, tensor in state.items() if ".lora_A." in name)


def add_adapter(model, rank, generator=None):
    """Put additions of a rank beside each `mix` of F, at first of product zero; the rest of F stops training.

    Args:
        generator: torch.Generator to draw from; None where a saved state is loaded next.
    """
    from peft import LoraConfig, inject_adapter_in_model

    for parameter in model.context_parameters():
        parameter.requires_grad_(False)
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=["mix"]), model.context_map
    )
    for name, parameter in model.context_map.named_parameters():
        if ".lora_A." in name:  # peft draws from the global generator
            drawn = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            parameter.data.copy_(drawn)
    model.context_map.to(model.embedding.weight.device)


@torch.no_grad()
def merge_adapter(model):
    """Add the products to the matrices they stand beside, in place, and take the additions away."""
    for layer in model.context_map.layers:
        layer.mix.merge()
        layer.mix = layer.mix.get_base_layer()
    for parameter in model.context_parameters():
        parameter.requires_grad_(True)
