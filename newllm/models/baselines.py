"""What a user would take instead: GRU, LSTM or Transformer, trained by the same Phase 2 on the same data.

Shapes: B sequences, T tokens, C context width, E embedding width, V vocabulary.
"""

import contextlib
import math
import warnings

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from newllm.errors import UserError
from newllm.models.network import EMBEDDING_STD, LanguageModel, TokenPredictor, Window

BASELINES = ("gru", "lstm", "transformer")
KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}  # of attention, by the setting
STD = 0.02  # of the Transformer's weights (GPT-2)


def build_model(settings, vocab_size, pretrained=None):
    """The network of a configuration's model_type: a Baseline, else a LanguageModel (arguments as there).

    Raises:
        UserError: the context is too narrow for a window of tokens.
    """
    if settings.model_type == "window" and settings.context_dim < Window.NARROWEST:
        raise UserError(f"model_type 'window' needs a context_dim of at least {Window.NARROWEST}.")
    kind = Baseline if settings.model_type in BASELINES else LanguageModel
    return kind(settings, vocab_size, pretrained)


class Baseline(TokenPredictor):
    """Embedding -> body -> head, with the interface and the arguments of LanguageModel; all in Phase 2.

    A GRU or LSTM stands where the context map does: its state is the context, the normalised embedding the
    token stream, and the same head reads both. A Transformer has its own way to join a token with what came
    before: no context, no layers of the head.
    """

    def __init__(self, settings, vocab_size, pretrained=None):
        transformer = settings.model_type == "transformer"
        # torch's and transformers' modules draw from the global generator; it ends as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            super().__init__(settings, vocab_size, None if transformer else settings.context_dim)
            self.embed_norm = nn.Identity() if transformer else nn.LayerNorm(settings.embed_dim)
            self.body = _transformer(settings) if transformer else _recurrent(settings)
            for matrix in (self.embedding, self.output):
                if matrix is not None:
                    nn.init.normal_(matrix.weight, std=STD if transformer else EMBEDDING_STD)
        self.kind, self.attention = settings.model_type, settings.attention
        if pretrained is not None:
            self.freeze_embedding(pretrained)

    def encode(self, ids):
        """Ids [B, T] -> (contexts [B, T, C], streams [B, T, E]) that have read tokens up to t."""
        embedded = self.token_dropout(self.embed_norm(self.embedding(ids)))
        if self.kind != "transformer":
            return self.body(embedded)[0], embedded
        with self._kernel():
            streams = self.body(inputs_embeds=embedded).last_hidden_state
        return streams[..., :0], streams

    def advance(self, ids, state=None):
        """One token further: ids [B] and what the last call left -> (context, stream, for the next call).

        A Transformer is left with the ids that it has positions for, and reads them all again.
        """
        if self.kind == "transformer":
            read = ids[:, None] if state is None else torch.cat([state, ids[:, None]], 1)
            state = read[:, -self.body.config.n_positions :]
            contexts, streams = self.encode(state)
            return contexts[:, -1], streams[:, -1], state
        embedded = self.embed_norm(self.embedding(ids[:, None]))
        contexts, state = self.body(embedded, state)
        return contexts[:, 0], embedded[:, 0], state

    def attention_in_effect(self, device, dtype):
        """Name of the kernel of attention in training, e.g. "flash_attention"; None where there is none.

        Raises:
            UserError: it is not the one asked for, which this device, type or dropout does not have.
        """
        if self.kind != "transformer":
            return None
        body = self.body.config
        shape = 1, body.n_head, body.n_positions, body.n_embd // body.n_head
        head = torch.empty(shape, device=device, dtype=dtype)
        try:
            with self._kernel(), warnings.catch_warnings(action="ignore"):
                # torch has no public way to ask.
                chosen = torch._fused_sdp_choice(head, head, head, None, body.attn_pdrop, True)
        except RuntimeError as error:
            raise UserError(
                f"attention '{self.attention}' cannot be had for {dtype} with dropout {body.attn_pdrop:g} on "
                f"{device.type}: take --attention auto."
            ) from error
        return SDPBackend(chosen).name.lower()

    def _kernel(self):
        return contextlib.nullcontext() if self.attention == "auto" else sdpa_kernel(KERNELS[self.attention])


def _recurrent(settings):
    kind = nn.GRU if settings.model_type == "gru" else nn.LSTM
    layers = settings.num_layers
    dropout = settings.dropout if layers > 1 else 0.0  # it stands between layers
    return kind(settings.embed_dim, settings.context_dim, layers, batch_first=True, dropout=dropout)


def _transformer(settings):
    """GPT-2's blocks, positions and initialisation (transformers), attention through torch's SDPA."""
    from transformers import GPT2Config, GPT2Model  # slow to import, and needed here alone

    rate, width = settings.dropout, settings.embed_dim
    settings = GPT2Config(
        vocab_size=1, bos_token_id=None, eos_token_id=None, n_positions=settings.max_seq_length, n_embd=width,
        n_layer=settings.num_layers, n_head=width // math.gcd(width, 64), resid_pdrop=rate, embd_pdrop=rate,
        attn_pdrop=rate, initializer_range=STD, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    body = GPT2Model(settings)
    body.set_input_embeddings(nn.Identity())  # it reads embeddings of our own
    return body
