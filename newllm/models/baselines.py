"""What a user would take instead: GRU, LSTM or Transformer, trained end to end by the same Phase 2, head and data.

Shapes: B sequences, T tokens, E embedding width, V vocabulary.
"""

import math

import torch
from torch import nn

from newllm.models.language_model import EMBEDDING_STD, TokenLayer

BASELINES = ("gru", "lstm", "transformer")
STD = 0.02  # of the Transformer's weights (GPT-2)


class Baseline(nn.Module):
    """Embedding -> body -> logits through the embedding matrix, with the interface of LanguageModel.

    A GRU or LSTM stands where the context map does: its state is the context, the normalised embedding the token stream, and
    the same head reads both. A Transformer has its own way to join a token with what came before: its context is empty.

    Args:
        config: model_type, widths, depths, dropout, tying and seed (newllm.config.Config).
        vocab_size: number of token ids V.
        pretrained: optional embedding matrix [V, E]; it is then frozen.
    """

    def __init__(self, config, vocab_size, pretrained=None):
        super().__init__()
        self.vocab_size, self.embed_dim, self.kind = vocab_size, config.embed_dim, config.model_type
        self.context_dim = 0 if self.kind == "transformer" else config.context_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.embedding = nn.Embedding(vocab_size, config.embed_dim)
            self.body = _transformer(config) if self.kind == "transformer" else _recurrent(config)
            self.embed_norm = nn.Identity() if self.kind == "transformer" else nn.LayerNorm(config.embed_dim)
            self.token_layers = nn.ModuleList(
                TokenLayer(config.context_dim, config.embed_dim, config.dropout)
                for _ in range(config.token_layers * (self.kind != "transformer"))
            )
            self.output = None if config.tie_weights else nn.Linear(config.embed_dim, vocab_size)
            std = STD if self.kind == "transformer" else EMBEDDING_STD
            for matrix in (self.embedding, self.output):
                if matrix is not None:
                    nn.init.normal_(matrix.weight, std=std)
        self._frozen = []
        if pretrained is not None:
            self.embedding.weight = nn.Parameter(pretrained.float().clone(), requires_grad=False)
            self._frozen = ["embedding.weight"]

    def encode(self, ids):
        """Ids [B, T] -> (contexts [B, T, C], streams [B, T, E]) that have read tokens up to t."""
        embedded = self.embed_norm(self.embedding(ids))
        if self.kind == "transformer":
            streams = self.body(inputs_embeds=embedded).last_hidden_state
            return streams[..., :0], streams
        return self.body(embedded)[0], embedded

    def hidden(self, context, stream):
        """What the logits are made of: (c_t [..., C], u_t [..., E]) -> h [..., E]."""
        for layer in self.token_layers:
            stream = layer(context, stream)
        return stream

    def output_weights(self):
        """(matrix [V, E], bias [V] or None) such that logits = h @ matrix.T + bias."""
        if self.output is None:
            return self.embedding.weight, None
        return self.output.weight, self.output.bias

    def frozen_state(self):
        """The part of the state dict that no training changes, by name."""
        return {name: tensor for name, tensor in self.state_dict().items() if name in self._frozen}

    def trained_state(self):
        """The rest of the state dict."""
        return {name: tensor for name, tensor in self.state_dict().items() if name not in self._frozen}

    def context_parameters(self):
        """None: there is no Phase 1."""
        return []

    def head_parameters(self):
        """All parameters that may train."""
        return [p for p in self.parameters() if p.requires_grad]


def _recurrent(config):
    kind = nn.GRU if config.model_type == "gru" else nn.LSTM
    between = config.dropout if config.num_layers > 1 else 0.0
    return kind(config.embed_dim, config.context_dim, config.num_layers, batch_first=True, dropout=between)


def _transformer(config):
    """GPT-2's blocks, positions and initialisation (transformers), attention through torch's SDPA."""
    from transformers import GPT2Config, GPT2Model  # slow to import, and needed here alone

    rate = config.dropout
    body = GPT2Model(
        GPT2Config(
            vocab_size=1,
            n_positions=config.max_seq_length,
            n_embd=config.embed_dim,
            n_layer=config.num_layers,
            n_head=config.embed_dim // math.gcd(config.embed_dim, 64),
            resid_pdrop=rate,
            embd_pdrop=rate,
            attn_pdrop=rate,
            initializer_range=STD,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    body.set_input_embeddings(nn.Identity())  # it reads embeddings of our own
    return body
