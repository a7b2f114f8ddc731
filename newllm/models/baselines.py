"""What a user would take instead: GRU, LSTM or Transformer, trained end to end by the same Phase 2, head and data.

Shapes: B sequences, T tokens, E embedding width, V vocabulary.
"""

import math

import torch
from torch import nn

from newllm.models.language_model import EMBEDDING_STD, Dropout, LanguageModel

BASELINES = ("gru", "lstm", "transformer")
STD = 0.02  # of the Transformer's weights (GPT-2)


def build_model(config, vocab_size, pretrained=None):
    """The network of a configuration's model_type: a Baseline, else a LanguageModel, which describes the arguments."""
    return (Baseline if config.model_type in BASELINES else LanguageModel)(config, vocab_size, pretrained)


class Baseline(nn.Module):
    """Embedding -> body -> logits through the embedding matrix, with dropout between them.

    To training and evaluation it looks like LanguageModel with an empty context: `encode` gives all token streams at once.

    Args:
        config: model_type, widths, num_layers, dropout, tying and seed (newllm.config.Config).
        vocab_size: number of token ids V.
        pretrained: optional embedding matrix [V, E]; it is then frozen.
    """

    def __init__(self, config, vocab_size, pretrained=None):
        super().__init__()
        self.vocab_size, self.embed_dim, self.context_dim = vocab_size, config.embed_dim, 0
        self.kind = config.model_type
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.embedding = nn.Embedding(vocab_size, config.embed_dim)
            self.body = _transformer(config) if self.kind == "transformer" else _recurrent(config)
            wide = config.context_dim != config.embed_dim and self.kind != "transformer"
            self.project = nn.Linear(config.context_dim, config.embed_dim) if wide else nn.Identity()
            self.output = None if config.tie_weights else nn.Linear(config.embed_dim, vocab_size)
            std = STD if self.kind == "transformer" else EMBEDDING_STD
            for matrix in (self.embedding, self.output):
                if matrix is not None:
                    nn.init.normal_(matrix.weight, std=std)
        self.dropout = Dropout(config.dropout)
        self._frozen = []
        if pretrained is not None:
            self.embedding.weight = nn.Parameter(pretrained.float().clone(), requires_grad=False)
            self._frozen = ["embedding.weight"]

    def encode(self, ids):
        """Ids [B, T] -> (contexts [B, T, 0], streams [B, T, E]); stream t has read tokens up to t."""
        embedded = self.embedding(ids)
        if self.kind == "transformer":
            streams = self.body(inputs_embeds=embedded).last_hidden_state
        else:
            streams = self.project(self.body(self.dropout(embedded))[0])
        return streams[..., :0], streams

    def hidden(self, context, stream):
        """What the logits are made of: (nothing, u_t [..., E]) -> h [..., E]."""
        return stream if self.kind == "transformer" else self.dropout(stream)

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
