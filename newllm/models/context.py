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
            return self.context_norm(context + torch.relu(functional.linear(joined, weight, bias))), None
        context_update, token_update = torch.relu(self.mix(joined)).split(self.widths, dim=-1)
        return self.context_norm(context + context_update), self.token_norm(token + token_update)


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
