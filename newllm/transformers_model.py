"""The model as a transformers model, whose logits are the log probabilities of its retrieval if it has one.

The state that generation keeps is the context and, for retrieval, a window of the text so far. A folder
written by `scripts.export --format transformers` carries this file and those it needs, so that transformers
alone can load it. Shapes: B sequences, T tokens, C and E widths of context and embedding, V vocabulary.
"""

import warnings
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from newllm.fixed_point.solver import prefill, sequential
from newllm.models.network import LanguageModel
from newllm.retrieval.lookup import Past
from newllm.retrieval.mixture import AT_ONCE, Retrieval
from newllm.versions import TESTED, outside

logger = logging.get_logger(__name__)
MAX_SWEEPS = 64  # of a piece; a map that has not converged by then is evaluated step by step
# Its name in the installed transformers: since 5.24 "cache", before that "past_key_values".
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class NewLLMConfig(PreTrainedConfig):
    """Shape of the network."""

    model_type = "newllm"
    network: str = "context"  # or "window", "token": model_type in config.py
    vocab_size: int = 4096
    hidden_size: int = 768  # of the context
    embed_dim: int = 768
    num_hidden_layers: int = 6  # of the context map F
    token_layers: int = 1  # of the head
    keeps_embedding: bool = False  # whether F reads a copy of the embedding, as with frozen contexts
    seed: int = 42  # of a window's projections
    tie_word_embeddings: bool = True
    prefill: str = "steps"  # how a prompt is read: token after token, or by "sweeps" over all of them ...
    prefill_tolerance: float = 1e-4  # ... to this relative change of each context
    retrieval: dict | str | None = None  # its Retrieval.description; "none", None: the network alone
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = 0
    pad_token_id: int | None = 0


class LookUp(Retrieval):
    """A retrieval whose tensors have the types that it gives them, whatever becomes of the network's."""

    @classmethod
    def described(cls, **description):
        """An empty one, made in fp32 where transformers makes the network in another type."""
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return super().described(**description)
        finally:
            torch.set_default_dtype(usual)

    def _apply(self, fn, recurse=True):
        """What `to`, `half` and the like do: here to another device alone."""

        def moved(tensor):
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(moved, recurse)

    def read_on(self, network, ids, contexts, streams, past, first=0):
        """Log probabilities [B, T - first, V] of what follows each place from `first` on, and the state.

        Arguments as of `read`, but that ids below 0 may lie anywhere.
        """
        known = torch.cat([past.ids, ids], 1) >= 0
        if (known[:, :-1] & ~known[:, 1:]).any():  # padding behind a token
            return self._row_by_row(network, ids, contexts, streams, past, first)
        if first:
            made = contexts[:, :first], streams[:, :first]
            past = self.remember(ids[:, :first], past, hidden=network.hidden(*made), contexts=made[0])
        logs = []
        for start in range(first, ids.shape[1], AT_ONCE):
            part = slice(start, start + AT_ONCE)
            shares, past = self.read(network, ids[:, part], contexts[:, part], streams[:, part], past)
            logs.append(shares.clamp_min(torch.finfo(shares.dtype).tiny).log())
        return torch.cat(logs, 1), past

    def _row_by_row(self, network, ids, contexts, streams, past, first):
        """The same, of each text without its padding; in the state that lies on the left."""
        logs, pasts = contexts.new_zeros(*ids.shape, self.vocab_size, dtype=torch.float32), []
        for row, there in enumerate(ids >= 0):
            own = Past(*(part[row : row + 1] for part in past))
            if there.any():
                parts = (part[row, there][None] for part in (ids, contexts, streams))
                logs[row, there], own = self.read_on(network, *parts, own)
            pasts.append(own.joined())
        longest = max(own.ids.shape[1] for own in pasts)
        for row, own in enumerate(pasts):
            short = longest - own.ids.shape[1]
            own_ids, own_keys = pad(own.ids, (short, 0), value=-1), pad(own.keys, (0, 0, short, 0))
            pasts[row] = own._replace(ids=own_ids, keys=own_keys)
        return logs[:, first:], Past(*map(torch.cat, zip(*pasts, strict=True)))


class ContextCache:
    """The state after the last token of each text, in the form of a cache.

    It is the context [B, C] and, of a model with retrieval, the text so far (newllm.retrieval.lookup.Past).
    """

    is_compileable = is_croppable = False  # a context cannot be rolled back
    is_linear = (True,)  # as for other recurrent models, input_ids are those that it has not read

    def __init__(self):
        self.context = self.past = None

    def get_seq_length(self, layer_idx=0):
        """No token's keys and values are kept."""
        return 0

    def reorder_cache(self, rows):
        """Take the rows [B'] of the batch, as beams do."""
        rows = rows.to(self.context.device)
        self.context = self.context.index_select(0, rows)
        if self.past is not None:
            self.past = Past(*(part.index_select(0, rows) for part in self.past))


class NewLLMOutput(CausalLMOutputWithPast):
    """Loss, logits [B, T, V], hidden_states, and the cache by each name that transformers has had for it."""

    def __getattr__(self, name):
        if name in ("cache", "cache_params"):
            return getattr(self, CACHE)
        raise AttributeError(name)


class NewLLMForCausalLM(PreTrainedModel, GenerationMixin):
    """Next-token prediction by stepping, or sweeping, a learned context, mixed with what is looked up."""

    config_class = NewLLMConfig
    base_model_prefix = "network"
    _is_stateful = True  # transformers then refuses what would roll a cache back
    _no_split_modules = ("ContextMap", "LookUp")
    # The network alone of a folder that has one.
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^retrieval\."]

    def __init__(self, config):
        super().__init__(config)
        for line in outside(TESTED or ()):
            warnings.warn(f"{line}: this model was not tested with it.", stacklevel=2)
        settings = SimpleNamespace(
            model_type=config.network, context_dim=config.hidden_size, embed_dim=config.embed_dim,
            num_layers=config.num_hidden_layers, token_layers=config.token_layers, seed=config.seed,
            tie_weights=config.tie_word_embeddings, freeze_context=config.keeps_embedding,
            init_scale=0.5, dropout=0.0, token_dropout=0.0,
        )  # fmt: skip
        self.network = LanguageModel(settings, config.vocab_size)
        self.retrieval = None
        if config.retrieval not in (None, "none"):
            if not isinstance(config.retrieval, dict):
                raise ValueError(
                    f"retrieval={config.retrieval!r}: give 'none', the network alone, or nothing."
                )
            try:
                self.retrieval = LookUp.described(**config.retrieval)
            except ValueError as error:
                raise ValueError(f"{error}: load it with retrieval='none', or export it anew.") from error
        self.post_init()

    def _init_weights(self, module):
        """The network initialises itself."""

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # `forward` makes its own

    def get_input_embeddings(self):
        return self.network.embedding

    def set_input_embeddings(self, value):
        self.network.embedding = value

    def get_output_embeddings(self):
        return self.network.output

    def set_output_embeddings(self, value):
        self.network.output = value

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """As in transformers, always with mean_resizing; new ids are as likely as the least likely were.

        Raises:
            ValueError: the end-of-text id, or every id, would go, or the model has a retrieval, which knows
                the ids of its training text alone; nothing has changed.
        """
        network = self.network
        same = new_num_tokens in (None, network.vocab_size) and pad_to_multiple_of is None
        if self.retrieval is not None and not same:
            raise ValueError(
                "what this model looks up has the ids of its training text: to change their number load it "
                "with from_pretrained(..., retrieval='none')."
            )
        needed = [self.config.eos_token_id, self.config.pad_token_id, 0]
        last = max(token for token in needed if isinstance(token, int))
        if new_num_tokens is not None and new_num_tokens <= last:
            raise ValueError(f"this model needs its ids up to {last}, so at least {last + 1} tokens.")
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of)
        size = embedding.num_embeddings
        kept = min(network.vocab_size, size)
        bias = network.output_bias.detach()
        bias = torch.cat([bias[:kept], bias.min().expand(size - kept)])
        network.output_bias = torch.nn.Parameter(bias, requires_grad=network.output_bias.requires_grad)
        if network.context_embedding is not None:
            added = embedding.weight.detach()[kept:]
            network.context_embedding = torch.cat([network.context_embedding[:kept], added])
        network.vocab_size = size
        return embedding

    def forward(
        self, input_ids, attention_mask=None, cache=None, labels=None, use_cache=None, logits_to_keep=0,
        output_hidden_states=False, return_dict=True, cache_params=None, past_key_values=None, **kwargs,
    ):  # fmt: skip
        """Read tokens on from a state.

        Args:
            input_ids: [B, T]. attention_mask: [B, T' >= T], 0: padding on the left, which changes no state.
            cache: what an earlier call returned; cache_params, past_key_values: its names before.
            labels: [B, T], shifted inside; -100: ignored. logits_to_keep: last positions, or indices; 0: all.

        Returns:
            NewLLMOutput. Its logits are log probabilities, in fp32, if there is a retrieval; hidden_states is
            (contexts [B, T, C],) if asked for.

        Raises:
            ValueError: given inputs_embeds or another model's cache, or an id that the model lacks.
        """
        names = cache, cache_params, past_key_values
        given = next((value for value in names if value is not None), None)
        cache = ContextCache() if given is None else given
        if kwargs.get("inputs_embeds") is not None or not isinstance(cache, ContextCache):
            raise ValueError(
                "this model reads input_ids on from the cache that it returned (cache, or cache_params): it "
                "takes neither inputs_embeds nor another model's cache."
            )
        known = self.network.vocab_size
        if (
            input_ids.shape[1] > 1 and input_ids.max() >= known
        ):  # generation draws single ones from the logits
            raise ValueError(
                f"input_ids hold {input_ids.max()}, and this model has the ids 0 to {known - 1}: after "
                "tokenizer.add_tokens call model.resize_token_embeddings(len(tokenizer))."
            )
        mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        if mask is not None and mask.all():
            mask = None
        contexts, streams = self.read(self.network.embed(input_ids), cache.context, mask)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        past = None
        if self.retrieval is None:
            logits = self.network.logits(contexts[:, keep], streams[:, keep])
        else:
            ids = input_ids if mask is None else input_ids.masked_fill(mask == 0, -1)
            logits, past = self.mixture(ids, contexts, streams, cache.past, keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=known, **kwargs)
        if self.config.use_cache if use_cache is None else use_cache:
            cache.context, cache.past = contexts[:, -1].detach(), past
        else:
            cache = given
        hidden = (contexts,) if output_hidden_states else None
        output = NewLLMOutput(loss=loss, logits=logits, hidden_states=hidden, **{CACHE: cache})
        return output if return_dict else output.to_tuple()

    def mixture(self, ids, contexts, streams, past, keep):
        """Log probabilities [B, kept, V] by network and retrieval, and the text so far.

        Args:
            ids: [B, T], below 0: padding. past: before them, or None. keep: slice or indices of places.
        """
        if self.training:
            logger.warning_once(
                "what this model looks up was made of its weights as they were: to train it load it with "
                "from_pretrained(..., retrieval='none')."
            )
        if past is None:
            past = self.retrieval.start(len(ids), ids.device)
        first = keep.indices(ids.shape[1])[0] if isinstance(keep, slice) else 0
        logs, past = self.retrieval.read_on(self.network, ids, contexts, streams, past, first)
        return logs if isinstance(keep, slice) else logs[:, keep], past

    def read(self, tokens, state=None, mask=None):
        """Contexts [B, T, C] and streams [B, T, E] of embeddings, from a state [B, C]; mask 0: padding."""
        step, width = self.network.step, self.config.hidden_size
        if mask is not None:
            # The solver passes on what a token is made of: its last feature says whether there is one.
            tokens = torch.cat([tokens, mask[..., None].to(tokens.dtype)], -1)

            def step(context, token, stream=True):
                new, stream = self.network.step(context, token[..., :-1], stream)
                return torch.where(token[..., -1:] > 0, new, context), stream

        if self.config.prefill == "sweeps" and tokens.shape[1] > 1 and not torch.is_grad_enabled():
            tolerance = self.config.prefill_tolerance
            contexts, streams, stats = prefill(step, tokens, width, tolerance, MAX_SWEEPS, start_BC=state)
            if all(stats.converged):
                return contexts, streams
        return sequential(step, tokens, width, state)


if __name__.startswith("newllm."):  # in an exported folder the configuration names the classes
    AutoConfig.register(NewLLMConfig.model_type, NewLLMConfig)
    AutoModelForCausalLM.register(NewLLMConfig, NewLLMForCausalLM)
