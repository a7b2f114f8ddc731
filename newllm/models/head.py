"""What every model here has: an embedding, a head that reads context and token stream, logits, and their frequencies at first.

Shapes: B sequences, T tokens, C context width, E embedding width, V vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional

from newllm.models.context import normed

# The token stream still points along its own token's vector, so a tied model starts by predicting each token to repeat,
# with a logit of about std * E: small enough here for the first loss to be that of the bias with thousands of ids.
EMBEDDING_STD = 0.01
ALIGNED_LOGIT = (
    10.0  # of a normed stream that points along a frozen vector of mean length: within a softmax's reach
)


class Dropout(nn.Module):
    """Inverted dropout with one random byte an element, so in steps of 1/256: a CPU draws these eight at a time."""

    def __init__(self, probability):
        super().__init__()
        self.dropped = min(255, round(256 * probability))  # of 256 values of a byte

    def forward(self, values):
        if not self.training or not self.dropped:
            return values
        if values.device.type != "cpu":
            return functional.dropout(values, self.dropped / 256)
        words = torch.randint(-(2**63), 2**63 - 1, [values.numel() // 8 + 1])
        kept = words.view(torch.uint8)[: values.numel()].view(values.shape) >= self.dropped
        return values * (kept.to(values.dtype) * (256 / (256 - self.dropped)))


class TokenDropout(nn.Module):
    """One fixed vector in place of some tokens' embeddings [..., T, E] (blank noising, Xie et al. 2017, arXiv 1703.02573).

    Not zeros: an untrained F makes zero contexts of them, whose norms have gradients that multiply from layer to layer.
    """

    def __init__(self, probability, embed_dim):
        super().__init__()
        self.probability = probability
        blank = torch.randn(embed_dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("blank", blank, persistent=False)

    def forward(self, embeddings):
        if not self.training or not self.probability:
            return embeddings
        hidden = torch.rand(*embeddings.shape[:-1], 1, device=embeddings.device) < self.probability
        return torch.where(
            hidden, (self.blank * embeddings.detach().float().std()).to(embeddings.dtype), embeddings
        )


class TokenLayer(nn.Module):
    """u <- LN(u + MLP([c; u])): where the head reads the context."""

    def __init__(self, context_dim, embed_dim, dropout):
        super().__init__()
        self.mlp = nn.Sequential(
            Dropout(dropout),
            nn.Linear(context_dim + embed_dim, context_dim + embed_dim),
            nn.GELU(),
            Dropout(dropout),
            nn.Linear(context_dim + embed_dim, embed_dim),
        )
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, context, stream):
        return normed(self.norm, stream + self.mlp(torch.cat([context, stream], dim=-1)))


class TokenPredictor(nn.Module):
    """Embedding and head; what makes context and stream from tokens is for the classes that inherit it.

    Args:
        config: embed_dim, token_layers, dropouts, tie_weights (newllm.config.Config).
        vocab_size: number of token ids V.
        context_dim: width C of the context that the head reads; None: no context, and no layers to read one.
    """

    def __init__(self, config, vocab_size, context_dim):
        super().__init__()
        self.vocab_size, self.context_dim, self.embed_dim = vocab_size, context_dim or 0, config.embed_dim
        self.embedding = nn.Embedding(vocab_size, config.embed_dim)
        layers = 0 if context_dim is None else config.token_layers
        self.token_layers = nn.ModuleList(
            TokenLayer(context_dim, self.embed_dim, config.dropout) for _ in range(layers)
        )
        self.output = None if config.tie_weights else nn.Linear(config.embed_dim, vocab_size, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size))
        self.token_dropout = TokenDropout(config.token_dropout, config.embed_dim)

    def hidden(self, context, stream):
        """Head up to the logits: (c_t [..., C], u_t [..., E]) -> h [..., E]."""
        for layer in self.token_layers:
            stream = layer(context, stream)
        return stream

    def output_weights(self):
        """(matrix [V, E], bias [V]) such that logits = h @ matrix.T + bias."""
        return (self.embedding if self.output is None else self.output).weight, self.output_bias

    def logits(self, context, stream):
        """(c_t, u_t) -> logits [..., V]. Training never calls this: it takes the loss in chunks of the vocabulary."""
        return functional.linear(self.hidden(context, stream), *self.output_weights())

    @torch.no_grad()
    def start_at_frequencies(self, ids):
        """Set the output bias to the log of each token's frequency among ids (one more of each): a unigram before training."""
        counts = torch.bincount(ids.flatten().long(), minlength=self.vocab_size) + 1
        self.output_bias.copy_((counts / counts.sum()).log())

    def freeze_embedding(self, pretrained):
        """Take given vectors [V, E] for good, scaled as a whole for the logits; what reads embeddings norms them anyway."""
        vectors = pretrained.float()
        scale = ALIGNED_LOGIT / (self.embed_dim**0.5 * vectors.norm(dim=1).mean())
        self.embedding.weight = nn.Parameter(scale * vectors, requires_grad=False)

    def frozen_state(self):
        """The part of the state dict that no training changes, by name."""
        return {name: tensor for name, tensor in self.state_dict().items() if name in self._frozen()}

    def trained_state(self):
        """The rest of the state dict; the two together are what `load_state_dict` wants."""
        return {name: tensor for name, tensor in self.state_dict().items() if name not in self._frozen()}

    def _frozen(self):
        return [] if self.embedding.weight.requires_grad else ["embedding.weight"]
