"""The context map F: one step `c_t, u_t = F(c_{t-1}, e_t)` of the recurrence. Knows no time axis, no solver, no loss.

Shapes: `...` any leading axes, C context width, E embedding width.
"""

import torch
from torch import nn
from torch.nn import functional


def in_compute_type(tensor):
    """The tensor in the type that autocast computes in here, else as it is: one fp32 input would make all of F copy and widen."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


class _Cast(torch.autograd.Function):
    """Tensors in another type, in one launch for all of them; so are their gradients on the way back."""

    @staticmethod
    def forward(ctx, kind, *tensors):
        ctx.set_materialize_grads(False)
        ctx.kinds, made = [tensor.dtype for tensor in tensors], _converted(tensors, [kind] * len(tensors))
        ctx.mark_non_differentiable(
            *(new for new, tensor in zip(made, tensors, strict=True) if not tensor.requires_grad)
        )
        return tuple(made)

    @staticmethod
    def backward(ctx, *gradients):
        there = [(at, gradient) for at, gradient in enumerate(gradients) if gradient is not None]
        found = [None] * len(gradients)
        for (at, _), wide in zip(
            there, _converted([g for _, g in there], [ctx.kinds[at] for at, _ in there]), strict=True
        ):
            found[at] = wide
        return None, *found


def _converted(tensors, kinds):
    made = [torch.empty_like(tensor, dtype=kind) for tensor, kind in zip(tensors, kinds, strict=True)]
    torch._foreach_copy_(made, list(tensors))
    return made


def cast_parameters(module):
    """{name: parameter in the type that autocast computes in here}, with gradient to the parameters."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    kind = torch.get_autocast_dtype(parameters[0].device.type)
    return dict(zip(names, _Cast.apply(kind, *parameters), strict=True))


def normed(norm, values):
    """A layer norm of values in their own type, with statistics in fp32 inside the kernel.

    Autocast for CUDA would widen the values and give fp32, which whatever reads it would have to narrow again.
    """
    if values.device.type == "cpu":  # whose autocast does not, and whose kernel takes weights of another type
        return norm(values)
    with torch.autocast(values.device.type, enabled=False):
        weight, bias = norm.weight.to(values.dtype), norm.bias.to(values.dtype)
        return functional.layer_norm(values, norm.normalized_shape, weight, bias, norm.eps)


class ResidualLayer(nn.Module):
    """o = ReLU(W [c; e] + b); c <- LN(c + o_c); e <- LN(e + o_e). Without `stream` the second half is left out (None)."""

    def __init__(self, context_dim, embed_dim):
        super().__init__()
        self.widths = [context_dim, embed_dim]
        self.mix = nn.Linear(context_dim + embed_dim, context_dim + embed_dim)
        self.context_norm = nn.LayerNorm(context_dim)
        self.token_norm = nn.LayerNorm(embed_dim)

    def forward(self, context, token, stream=True):
        joined = torch.cat([context, token], dim=-1)
        if not stream and type(self.mix) is nn.Linear:  # an adapted layer is more than its matrix
            weight, bias = (part[: self.widths[0]] for part in (self.mix.weight, self.mix.bias))
            return normed(
                self.context_norm, context + torch.relu(functional.linear(joined, weight, bias))
            ), None
        context_update, token_update = torch.relu(self.mix(joined)).split(self.widths, dim=-1)
        return normed(self.context_norm, context + context_update), normed(
            self.token_norm, token + token_update
        )


class ContextMap(nn.Module):
    """A stack of residual layers on the pair (context, token embedding)."""

    def __init__(self, context_dim, embed_dim, num_layers):
        super().__init__()
        self.context_dim = context_dim
        self.layers = nn.ModuleList(ResidualLayer(context_dim, embed_dim) for _ in range(num_layers))

    def forward(self, context, token, stream=True):
        """One step of F.

        Args:
            context: previous context c_{t-1} [..., C].
            token: normalised embedding e_t of the current token [..., E].
            stream: whether u_t is wanted; half of the last layer is for it alone.

        Returns:
            (c_t [..., C], token stream u_t [..., E] or None).
        """
        for layer in self.layers:
            context, token = layer(context, token, stream or layer is not self.layers[-1])
        return context, token
