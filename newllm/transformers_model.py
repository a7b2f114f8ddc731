"""The model as a transformers model: its context is the recurrent state that generation keeps, whatever the length.

It wraps newllm.models.language_model.LanguageModel; there is no second implementation. A folder written by
`scripts.export --format transformers` carries this file and those it needs, so transformers alone can load it.
Shapes: B sequences, T tokens, C context width, E embedding width, V vocabulary.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from newllm.fixed_point.solver import prefill, sequential
from newllm.models.language_model import LanguageModel

PREFILLS = ("steps", "sweeps")
MAX_SWEEPS = 64  # of a piece; a map that has not converged by then is evaluated step by step


class NewLLMConfig(PreTrainedConfig):
    """Shape of the network.

    Attributes:
        network: "context", "window" or "token", as model_type in config.py; seed: of a window's projections.
        hidden_size: context width C. embed_dim: embedding width E. num_hidden_layers: of the context map; token_layers: of the
            head. keeps_embedding: whether F reads a copy of the embedding, as after training with frozen contexts.
        prefill: how a prompt is read: "steps", one token after the other, or "sweeps" over all of them, to
            prefill_tolerance (relative, of each context).
    """

    model_type = "newllm"
    network: str = "context"
    vocab_size: int = 4096
    hidden_size: int = 768
    embed_dim: int = 768
    num_hidden_layers: int = 6
    token_layers: int = 1
    keeps_embedding: bool = False
    seed: int = 42
    tie_word_embeddings: bool = True
    prefill: str = "steps"
    prefill_tolerance: float = 1e-4
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = 0
    pad_token_id: int | None = 0

    @property
    def layer_types(self):
        """What transformers makes a cache from: the context is the first one's state, the others stay empty."""
        return ["linear_attention"] * self.num_hidden_layers


@dataclass
class NewLLMOutput(ModelOutput):
    """Loss (mean over labels, where given), logits [B, T, V] and the context after the last token, as a cache."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache_params: DynamicCache | None = None
    hidden_states: tuple | None = None


class NewLLMForCausalLM(PreTrainedModel, GenerationMixin):
    """Next-token prediction by stepping, or sweeping, a learned context."""

    config_class = NewLLMConfig
    base_model_prefix = "network"
    main_input_name = "input_ids"
    _is_stateful = True
    _no_split_modules = ("ContextMap",)

    def __init__(self, config):
        super().__init__(config)
        settings = SimpleNamespace(
            model_type=config.network, context_dim=config.hidden_size, embed_dim=config.embed_dim,
            num_layers=config.num_hidden_layers, token_layers=config.token_layers, tie_weights=config.tie_word_embeddings,
            freeze_context=config.keeps_embedding, init_scale=0.5, dropout=0.0, token_dropout=0.0, seed=config.seed,
        )  # fmt: skip
        self.network = LanguageModel(settings, config.vocab_size)
        self.post_init()

    def _init_weights(self, module):
        """The network initialises itself."""

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # `forward` makes its own: it holds no keys and values

    def get_input_embeddings(self):
        return self.network.embedding

    def set_input_embeddings(self, value):
        self.network.embedding = value

    def get_output_embeddings(self):
        return self.network.output

    def forward(
        self, input_ids, attention_mask=None, cache_params=None, labels=None, use_cache=None, logits_to_keep=0,
        output_hidden_states=False, return_dict=True, **kwargs,
    ):  # fmt: skip
        """Read tokens on from a state.

        Args:
            input_ids: [B, T]. attention_mask: [B, T' >= T], 0 for padding on the left, which leaves the state as it is.
            cache_params: what an earlier call returned. labels: [B, T], shifted inside; -100 is ignored.
            logits_to_keep: last positions with logits, or their indices; 0: all.

        Returns:
            NewLLMOutput; hidden_states is (contexts [B, T, C],) if asked for.

        Raises:
            ValueError: given inputs_embeds or past_key_values, which it would otherwise pass over.
        """
        if "past_key_values" in kwargs or kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "this model reads input_ids on from cache_params: it takes neither inputs_embeds nor past_key_values, "
                "which guidance_scale needs."
            )
        state = None
        if cache_params is not None and cache_params.layers[0].is_recurrent_states_initialized[0]:
            state = cache_params.layers[0].recurrent_states[0]
        mask = None
        if attention_mask is not None and not attention_mask[:, -input_ids.shape[1] :].all():
            mask = attention_mask[:, -input_ids.shape[1] :]
        contexts, streams = self.read(self.network.embed(input_ids), state, mask)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.network.logits(contexts[:, keep], streams[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if self.config.use_cache if use_cache is None else use_cache:
            cache_params = DynamicCache(config=self.config) if cache_params is None else cache_params
            cache_params.update_recurrent_state(contexts[:, -1].detach(), 0)
        hidden = (contexts,) if output_hidden_states else None
        output = NewLLMOutput(loss=loss, logits=logits, cache_params=cache_params, hidden_states=hidden)
        return output if return_dict else output.to_tuple()

    def read(self, tokens, state=None, mask=None):
        """Contexts [B, T, C] and token streams [B, T, E] of embeddings [B, T, E], from a state [B, C]; 0 in the mask: padding."""
        step, width = self.network.step, self.config.hidden_size
        if mask is not None:

            def step(context, token, stream=True):
                """The last feature of a token says whether there is one."""
                there = token[..., -1:]
                new, stream = self.network.step(context, token[..., :-1], stream)
                return torch.where(there > 0, new, context), stream

            tokens = torch.cat([tokens, mask[..., None].to(tokens.dtype)], -1)
        if self.config.prefill == "sweeps" and tokens.shape[1] > 1 and not torch.is_grad_enabled():
            *found, stats = prefill(step, tokens, width, self.config.prefill_tolerance, MAX_SWEEPS, start_BC=state)
            if all(stats.converged):
                return found
        return sequential(step, tokens, width, state)


if __name__.startswith("newllm."):  # in an exported folder the configuration names the classes
    AutoConfig.register(NewLLMConfig.model_type, NewLLMConfig)
    AutoModelForCausalLM.register(NewLLMConfig, NewLLMForCausalLM)
