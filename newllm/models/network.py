"""The language model: embedding -> context map F -> head -> logits. Knows no training and no solver.

Where contexts are to stay as Phase 1 made them, F reads a copy of the embedding that nothing trains; where they are
fine-tuned, there is one embedding, and F learns how to read it.

Shapes: B sequences, T tokens, C context width, E embedding width, V vocabulary.
"""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from newllm.models.context import ContextMap, ResidualLayer, cast_parameters, in_compute_type
from newllm.models.head import EMBEDDING_STD, TokenPredictor
from newllm.models.window import NoContext, Window


class LanguageModel(TokenPredictor):
    """Next-token predictor whose memory is the context c_t.

    Args:
        config: widths, depths, dropout, tying and initial scale (newllm.config.Config).
        vocab_size: number of token ids V.
        pretrained: optional embedding matrix [V, E]; it is then frozen.
    """

    def __init__(self, config, vocab_size, pretrained=None):
        super().__init__(config, vocab_size, config.context_dim)
        self.embed_norm = nn.LayerNorm(config.embed_dim)
        if config.model_type == "window":
            self.context_map = Window(config.context_dim, config.embed_dim, config.seed)
        elif config.model_type == "token":
            self.context_map = NoContext()
        else:
            self.context_map = ContextMap(config.context_dim, config.embed_dim, config.num_layers)
        init_weights(self, config.init_scale, config.seed)
        if pretrained is not None:
            self.freeze_embedding(pretrained)
        self.register_buffer("context_embedding", None)
        if config.freeze_context or config.model_type != "context":
            self.keep_context_embedding()

    def keep_context_embedding(self):
        """Let F read a copy of the embedding from now on, so that training the embedding does not move the contexts."""
        self.context_embedding = self.embedding.weight.detach().clone()
        if self.output is not None:
            self.embedding.weight.requires_grad_(False)  # nothing would train it

    def embed(self, ids, fixed=False):
        """Token ids [...] -> normalised embeddings e_t [..., E] for F, in the type F computes in.

        Args:
            fixed: no gradient to the embedding itself.
        """
        weight = self.embedding.weight if self.context_embedding is None else self.context_embedding
        return in_compute_type(
            self.embed_norm(functional.embedding(ids, weight.detach() if fixed else weight))
        )

    def step(self, context, token, stream=True):
        """One step of F on normalised embeddings: (c_{t-1} [..., C], e_t [..., E]) -> (c_t, u_t or, without stream, None)."""
        return self.context_map(context, token, stream)

    def cast_step(self):
        """`step` for the many calls of one batch: on CUDA under autocast F's weights are cast here, and not by each call."""
        kind = self.output_bias.device.type
        learned = any(True for _ in self.context_map.parameters())
        if kind == "cpu" or not torch.is_autocast_enabled(kind) or not learned:
            return self.step
        weights = cast_parameters(self.context_map)
        return lambda *inputs, **how: functional_call(self.context_map, weights, inputs, how)

    def advance(self, ids, state=None):
        """One token further: ids [B] and what the last call left -> (logits [B, V], the context [B, C] for the next call)."""
        tokens = self.embed(ids)
        context = tokens.new_zeros(len(ids), self.context_dim) if state is None else state
        context, stream = self.step(context, tokens)
        return self.logits(context, stream), context

    def context_parameters(self):
        """Parameters that move the contexts; Phase 1 trains exactly these. A window and an empty context have none.

        Those of an adapter alone, while there is one (newllm.models.adapter).
        """
        if added := [p for name, p in self.context_map.named_parameters() if ".lora_" in name]:
            return added
        learned = [*self.context_map.parameters()]
        return [*self.embed_norm.parameters(), *learned] if learned else []

    def head_parameters(self):
        """All other parameters that may train: token layers, output, and the embedding unless it is frozen."""
        context = {id(p) for p in (*self.embed_norm.parameters(), *self.context_map.parameters())}
        return [p for p in self.parameters() if id(p) not in context and p.requires_grad]

    def _frozen(self):
        own = [] if self.context_embedding is None else ["context_embedding"]
        return own + super()._frozen()


@torch.no_grad()
def init_weights(model, init_scale, seed):
    """Initialise every parameter, from its own generator so that nothing else can shift the draw.

    Matrices of F: normal, std init_scale / sqrt(fan-in): small enough for F to contract, unlike a fixed std.
    Other matrices: normal, std 1 / sqrt(fan-in). Embeddings and output: normal, EMBEDDING_STD. Norms: identity. Biases: zero.
    """
    generator = torch.Generator().manual_seed(seed)
    in_context_map = {id(m.mix) for m in model.modules() if isinstance(m, ResidualLayer)}
    # The head last: it must not shift the draw of the context map.
    parts = (model.embedding, model.embed_norm, model.context_map, model.token_layers, model.output)
    for module in (module for part in parts if part is not None for module in part.modules()):
        if isinstance(module, nn.Embedding) or module is model.output:
            module.weight.normal_(0, EMBEDDING_STD, generator=generator)
        elif isinstance(module, nn.Linear):
            scale = init_scale if id(module) in in_context_map else 1.0
            module.weight.normal_(0, scale / module.in_features**0.5, generator=generator)
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(1)
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
