"""The context map F: one residual step on the pair (context, token)."""

import pytest
import torch
from torch.nn import functional

from newllm.models.network import ContextMap, ResidualLayer

C, E = 6, 4


def inputs(*shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, width, generator=generator, dtype=torch.float64) for width in (C, E)]


def test_a_layer_is_its_formula():
    """o = ReLU(W [c; e] + b); c <- LN(c + o_c); e <- LN(e + o_e)."""
    torch.manual_seed(0)
    layer = ResidualLayer(C, E).double()
    context, token = inputs(3)
    update = torch.relu(torch.cat([context, token], 1) @ layer.mix.weight.T + layer.mix.bias)
    new_context, new_token = layer(context, token)
    torch.testing.assert_close(new_context, functional.layer_norm(context + update[:, :C], (C,)))
    torch.testing.assert_close(new_token, functional.layer_norm(token + update[:, C:], (E,)))


def test_the_map_is_its_layers_in_turn():
    """Both halves of the pair go through every layer."""
    torch.manual_seed(0)
    step = ContextMap(C, E, 3).double()
    context, token = inputs(3)
    got = step(context, token)
    for layer in step.layers:
        context, token = layer(context, token)
    assert torch.equal(got[0], context) and torch.equal(got[1], token)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4)])
def test_any_leading_axes_are_independent(shape):
    """A step on a batch is the step on each of its entries."""
    torch.manual_seed(0)
    step = ContextMap(C, E, 2).double()
    context, token = inputs(*shape)
    new_context, new_token = step(context, token)
    assert new_context.shape == (*shape, C) and new_token.shape == (*shape, E)
    flat = [step(c, e) for c, e in zip(context.reshape(-1, C), token.reshape(-1, E), strict=True)]
    torch.testing.assert_close(new_context.reshape(-1, C), torch.stack([c for c, _ in flat]))
    torch.testing.assert_close(new_token.reshape(-1, E), torch.stack([u for _, u in flat]))
