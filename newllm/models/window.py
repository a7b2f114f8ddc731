"""A context that nobody trains: the last few tokens and slow averages of all. The control for every learned memory."""

import torch
from torch import nn

from newllm.errors import UserError

LAGS = 8  # tokens kept in order
TIME_CONSTANTS = (4, 16, 64, 256)  # tokens over which the averages forget


class Window(nn.Module):
    """c_t = [P e_t, ..., P e_{t-7}; leaky averages of Q_i e], u_t = e_t, with fixed random projections.

    A step like that of ContextMap, so that all that evaluates the one evaluates the other. Half of the width goes to the
    lags (a delay line: the sweeps are exact after as many) and half to the averages, a <- l a + sqrt(1 - l^2) Q e.

    Raises:
        UserError: the context is too narrow to hold them.
    """

    def __init__(self, context_dim, embed_dim, seed):
        super().__init__()
        self.lag_dim = max(1, context_dim // 2 // LAGS)
        slow = context_dim - LAGS * self.lag_dim
        if slow < len(TIME_CONSTANTS):
            raise UserError(
                f"model_type 'window' needs a context_dim of at least {LAGS + len(TIME_CONSTANTS)}."
            )
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer(
            "lag", torch.randn(embed_dim, self.lag_dim, generator=generator) / embed_dim**0.5
        )
        self.register_buffer("slow", torch.randn(embed_dim, slow, generator=generator) / embed_dim**0.5)
        constants = torch.tensor(TIME_CONSTANTS).repeat_interleave(-(-slow // len(TIME_CONSTANTS)))[:slow]
        self.register_buffer("decay", torch.exp(-1 / constants))

    def forward(self, context, token, stream=True):
        """One step: (c_{t-1} [..., C], e_t [..., E]) -> (c_t, e_t)."""
        lags, slow = context.split([LAGS * self.lag_dim, len(self.decay)], dim=-1)
        decay = self.decay.to(token.dtype)
        slow = decay * slow + (1 - decay**2).sqrt() * (token @ self.slow.to(token.dtype))
        return torch.cat([token @ self.lag.to(token.dtype), lags[..., : -self.lag_dim], slow], dim=-1), token


class NoContext(nn.Module):
    """c_t = 0, u_t = e_t: what the current token alone is good for."""

    def forward(self, context, token, stream=True):
        """One step: (c_{t-1} [..., C], e_t [..., E]) -> (0, e_t)."""
        return torch.zeros_like(context), token
