"""The language model: embedding -> context map F -> head -> logits. Knows no training and no solver.

Two embeddings exist: `embedding` trains and gives the logits when tied; `context_embedding` is frozen and feeds F, so that
Phase 2 can train embeddings without moving the contexts. Both start equal.

Shapes: B sequences, T tokens, C context width, E embedding width, V vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional

from newllm.models.context import ContextMap, ResidualLayer, in_compute_type
from newllm.models.window import NoContext, Window

# The token stream still points along its own token's vector, so a tied model starts by predicting each token to repeat,
# with a logit of about std * E: small enough here for the first loss to be ln(V) with thousands of ids.
EMBEDDING_STD = 0.01


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
        return self.norm(stream + self.mlp(torch.cat([context, stream], dim=-1)))


class LanguageModel(nn.Module):
    """Next-token predictor whose memory is the context c_t.

    Args:
        config: widths, depths, dropout, tying and initial scale (newllm.config.Config).
        vocab_size: number of token ids V.
        pretrained: optional embedding matrix [V, E]; it is then frozen, and shared by both embeddings.
    """

    def __init__(self, config, vocab_size, pretrained=None):
        super().__init__()
        self.vocab_size, self.context_dim, self.embed_dim = vocab_size, config.context_dim, config.embed_dim
        self.embedding = nn.Embedding(vocab_size, config.embed_dim)
        self.embed_norm = nn.LayerNorm(config.embed_dim)
        if config.model_type == "window":
            self.context_map = Window(config.context_dim, config.embed_dim, config.seed)
        elif config.model_type == "token":
            self.context_map = NoContext()
        else:
            self.context_map = ContextMap(config.context_dim, config.embed_dim, config.num_layers)
        self.token_layers = nn.ModuleList(
            TokenLayer(config.context_dim, config.embed_dim, config.dropout) for _ in range(config.token_layers)
        )
        self.output = None if config.tie_weights else nn.Linear(config.embed_dim, vocab_size)
        init_weights(self, config.init_scale, config.seed)
        if pretrained is not None:
            self.embedding.weight = nn.Parameter(pretrained.float().clone(), requires_grad=False)
        self.register_buffer("context_embedding", self.embedding.weight.detach().clone())
        if not config.tie_weights:
            self.embedding.weight.requires_grad_(False)  # F reads its own copy, so nothing would train it
        self._frozen = ["context_embedding"] + ["embedding.weight"] * (not self.embedding.weight.requires_grad)

    def embed(self, ids):
        """Token ids [...] -> normalised embeddings e_t [..., E] for F, from the frozen copy, in the type F computes in."""
        return in_compute_type(self.embed_norm(functional.embedding(ids, self.context_embedding)))

    def step(self, context, token, stream=True):
        """One step of F on normalised embeddings: (c_{t-1} [..., C], e_t [..., E]) -> (c_t, u_t or, without stream, None)."""
        return self.context_map(context, token, stream)

    def hidden(self, context, stream):
        """Head up to the logits: (c_t [..., C], u_t [..., E]) -> h [..., E]."""
        for layer in self.token_layers:
            stream = layer(context, stream)
        return stream

    def output_weights(self):
        """(matrix [V, E], bias [V] or None) such that logits = h @ matrix.T + bias."""
        if self.output is None:
            return self.embedding.weight, None
        return self.output.weight, self.output.bias

    def logits(self, context, stream):
        """(c_t, u_t) -> logits [..., V]. Training never calls this: it takes the loss in chunks of the vocabulary."""
        return functional.linear(self.hidden(context, stream), *self.output_weights())

    def frozen_state(self):
        """The part of the state dict that no training changes, by name."""
        return {name: tensor for name, tensor in self.state_dict().items() if name in self._frozen}

    def trained_state(self):
        """The rest of the state dict; the two together are what `load_state_dict` wants."""
        return {name: tensor for name, tensor in self.state_dict().items() if name not in self._frozen}

    def context_parameters(self):
        """Parameters that move the contexts; Phase 1 trains exactly these. A window and an empty context have none."""
        learned = [*self.context_map.parameters()]
        return [*self.embed_norm.parameters(), *learned] if learned else []

    def head_parameters(self):
        """All other parameters that may train: token layers, output, and the embedding unless it is frozen."""
        context = {id(p) for p in (*self.embed_norm.parameters(), *self.context_map.parameters())}
        return [p for p in self.parameters() if id(p) not in context and p.requires_grad]


@torch.no_grad()
def init_weights(model, init_scale, seed):
    """Initialise every parameter, from its own generator so that nothing else can shift the draw.

    Matrices of F: normal, std init_scale / sqrt(fan-in): small enough for F to contract, unlike a fixed std.
    Other matrices: normal, std 1 / sqrt(fan-in). Embeddings and output: normal, EMBEDDING_STD. Norms: identity. Biases: zero.
    """
    generator = torch.Generator().manual_seed(seed)
    in_context_map = {id(m.mix) for m in model.modules() if isinstance(m, ResidualLayer)}
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is model.output:
            module.weight.normal_(0, EMBEDDING_STD, generator=generator)
        elif isinstance(module, nn.Linear):
            scale = init_scale if id(module) in in_context_map else 1.0
            module.weight.normal_(0, scale / module.in_features**0.5, generator=generator)
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(1)
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
