"""Recurrences whose fixed points, memory and convergence are known by hand, and a small network."""

import torch

from newllm.models.network import ContextMap


def network(context_dim=6, embed_dim=5, num_layers=2):
    """The residual map in fp64, with weights and norms drawn at random."""
    generator = torch.Generator().manual_seed(0)
    module = ContextMap(context_dim, embed_dim, num_layers).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def random_tokens(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def memoryless(context, token):
    """c_t = e_t."""
    return token, token


def delay_line(context, token):
    """c_t = [e_t, e_{t-1}, ...]: as many tokens as the context has room for."""
    return torch.cat([token, context], dim=-1)[..., : context.shape[-1]], token


def leaky(factor):
    """c_t = factor * c_{t-1} + e_t."""
    return lambda context, token: (factor * context + token, token)


def chaotic(context, token):
    """c_t = sin(8 c_{t-1}) + e_t: bounded, but neighbouring trajectories part."""
    return torch.sin(8 * context) + token, token
