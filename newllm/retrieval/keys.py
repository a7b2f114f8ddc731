"""Keys: vectors of length 1 whose cosine says how alike two places in texts are.

Shapes: B texts, T tokens, E width of the head's output, C context width, K width of a key, V vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional

PARTS = ("hidden", "contexts", "tokens")
LAST_TOKENS = 3
TOKEN_WIDTH = 32  # of the random vector that stands for a token: two of them have a cosine near 0
NARROWED = 64  # directions kept of the head's output, and of a context
SAMPLE = 20_000  # training places that the directions are taken from


class Keys(nn.Module):
    """Parts of equal weight, each of length 1: what the network made of the place, and the tokens there.

    "hidden" is the head's output before the logits, "contexts" the context, both centred on training places
    and narrowed to their directions of largest variance; "tokens" spells the last three tokens out.

    Args:
        parts: some of PARTS. vocab_size: V. widths: {"hidden": E, "contexts": C}, of those that are parts.
    """

    def __init__(self, parts, vocab_size, widths):
        super().__init__()
        self.parts, self.widths = parts, widths
        self.width = 0
        for name in parts:
            if name == "tokens":
                generator = torch.Generator().manual_seed(0)
                table = functional.normalize(torch.randn(vocab_size, TOKEN_WIDTH, generator=generator), dim=1)
                self.register_buffer("table", table)
                self.width += LAST_TOKENS * TOKEN_WIDTH
                continue
            kept = min(NARROWED, widths[name])
            self.register_buffer(f"{name}_mean", torch.zeros(widths[name]))
            self.register_buffer(f"{name}_directions", torch.zeros(widths[name], kept))
            self.width += kept

    def fit(self, places):
        """Means and directions from training places, {"hidden": [n, E], "contexts": [n, C]}; returns self."""
        for name in self.parts:
            if name == "tokens":
                continue
            spread = places[name][:SAMPLE].double().cpu()  # small GPUs have next to no fp64
            mean, directions = getattr(self, f"{name}_mean"), getattr(self, f"{name}_directions")
            mean.copy_(spread.mean(0))
            centred = spread - spread.mean(0)
            _, vectors = torch.linalg.eigh(centred.T @ centred)
            directions.copy_(vectors[:, -directions.shape[1] :])
        return self

    def forward(self, ids, **made):
        """Keys [B, T, K] of the last T of ids [B, T' >= T], below 0: none there; made: parts [B, T, ...]."""
        parts = []
        for name in self.parts:
            if name == "tokens":
                parts.append(self._spelled(ids))
                continue
            narrowed = made[name].float() - getattr(self, f"{name}_mean")
            parts.append(_unit(narrowed @ getattr(self, f"{name}_directions")))
        length = min(part.shape[1] for part in parts)
        return _unit(torch.cat([part[:, -length:] for part in parts], -1))

    def _spelled(self, ids):
        vectors = self.table[ids.clamp_min(0)] * (ids >= 0)[..., None]
        count, vectors = ids.shape[1], functional.pad(vectors, (0, 0, LAST_TOKENS - 1, 0))
        back = []
        for lag in range(LAST_TOKENS):
            earlier = vectors[:, LAST_TOKENS - 1 - lag :][:, :count]
            back.append(earlier * 0.5 ** (lag / 2))  # it counts half as much in a cosine as the one after it
        return _unit(torch.cat(back, -1))


def _unit(vectors):
    """Vectors [..., K] of length 1; torch's own function for it costs one token half as much again."""
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(1e-12)
