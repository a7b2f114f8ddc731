"""The network: context map F, head, and the language model of the two. Knows no training, solver or loss.

One step of F is `c_t, u_t = F(c_{t-1}, e_t)`: from the last context and the embedding of the current token to
the next context and a token stream, which the head turns into logits.
Shapes: `...` any leading axes, B sequences, T tokens, C context width, E embedding width, V vocabulary.
"""

import functools

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

# The token stream still points along its own token's vector, so a tied model starts by predicting each token
# to repeat, with a logit of about std * E: small enough for the first loss to be that of the bias.
EMBEDDING_STD = 0.01
# Of a normed stream that points along a frozen vector of mean length: within a softmax's reach.
ALIGNED_LOGIT = 10.0

# The context map F


class ResidualLayer(nn.Module):
    """o = ReLU(W [c; e] + b); c <- LN(c + o_c); e <- LN(e + o_e), or None without `stream`."""

    def __init__(self, context_dim, embed_dim):
        super().__init__()
        self.widths = [context_dim, embed_dim]
        self.mix = nn.Linear(context_dim + embed_dim, context_dim + embed_dim)
        self.context_norm = nn.LayerNorm(context_dim)
        self.token_norm = nn.LayerNorm(embed_dim)

    def forward(self, context, token, stream=True):
        joined = torch.cat([context, token], dim=-1)
        # Saves half of the product where nobody reads the stream. An adapted layer is more than its matrix.
        if not stream and type(self.mix) is nn.Linear:
            rows = slice(self.widths[0])
            update = torch.relu(functional.linear(joined, self.mix.weight[rows], self.mix.bias[rows]))
            return normed(self.context_norm, context + update), None
        context_update, token_update = torch.relu(self.mix(joined)).split(self.widths, dim=-1)
        context = normed(self.context_norm, context + context_update)
        return context, normed(self.token_norm, token + token_update)


class ContextMap(nn.Module):
    """F: a stack of residual layers on the pair (context, token embedding)."""

    def __init__(self, context_dim, embed_dim, num_layers):
        super().__init__()
        self.layers = nn.ModuleList(ResidualLayer(context_dim, embed_dim) for _ in range(num_layers))

    def forward(self, context, token, stream=True):
        """(c_{t-1} [..., C], normalised e_t [..., E]) -> (c_t, u_t); u_t is None without `stream`."""
        for layer in self.layers:
            context, token = layer(context, token, stream or layer is not self.layers[-1])
        return context, token


class Window(nn.Module):
    """The control for every learned memory, which nobody trains: the last tokens and slow averages of all.

    c_t = [P e_t, ..., P e_{t-7}; leaky averages of Q e], u_t = e_t, with fixed random projections P and Q.
    Half of the width goes to the lags (a delay line: sweeps are exact after as many), half to the averages,
    a <- l a + sqrt(1 - l^2) Q e.
    """

    LAGS = 8  # tokens kept in order
    TIME_CONSTANTS = (4, 16, 64, 256)  # tokens over which the averages forget
    NARROWEST = LAGS + len(TIME_CONSTANTS)  # context that holds one value of each

    def __init__(self, context_dim, embed_dim, seed):
        super().__init__()
        self.lag_dim = max(1, context_dim // 2 // self.LAGS)
        slow_dim = context_dim - self.LAGS * self.lag_dim
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("lag", draw(embed_dim, self.lag_dim) / embed_dim**0.5)
        self.register_buffer("slow", draw(embed_dim, slow_dim) / embed_dim**0.5)
        repeats = -(-slow_dim // len(self.TIME_CONSTANTS))
        constants = torch.tensor(self.TIME_CONSTANTS).repeat_interleave(repeats)[:slow_dim]
        self.register_buffer("decay", torch.exp(-1 / constants))

    def forward(self, context, token, stream=True):
        """(c_{t-1} [..., C], e_t [..., E]) -> (c_t, e_t)."""
        lags, slow = context.split([self.LAGS * self.lag_dim, len(self.decay)], dim=-1)
        decay = self.decay.to(token.dtype)
        # The factor gives the average of white tokens the variance of Q e, whatever the time constant.
        slow = decay * slow + (1 - decay**2).sqrt() * (token @ self.slow.to(token.dtype))
        newest = token @ self.lag.to(token.dtype)
        return torch.cat([newest, lags[..., : -self.lag_dim], slow], dim=-1), token


class NoContext(nn.Module):
    """c_t = 0, u_t = e_t: what the current token alone is good for."""

    def forward(self, context, token, stream=True):
        return torch.zeros_like(context), token


# The head


class Dropout(nn.Module):
    """Inverted dropout with one random byte an element, so in steps of 1/256."""

    def __init__(self, probability):
        super().__init__()
        self.dropped = min(255, round(256 * probability))  # of 256 values of a byte

    def forward(self, values):
        if not self.training or not self.dropped:
            return values
        if values.device.type != "cpu":
            return functional.dropout(values, self.dropped / 256)  # one kernel there
        # Eight bytes a draw: with its gradient 0.3 to 0.45 of the time of torch's, which shows in a step.
        words = torch.randint(-(2**63), 2**63 - 1, [values.numel() // 8 + 1])
        kept = words.view(torch.uint8)[: values.numel()].view(values.shape) >= self.dropped
        return values * (kept.to(values.dtype) * (256 / (256 - self.dropped)))


class TokenDropout(nn.Module):
    """One fixed vector in place of some tokens' embeddings [..., T, E] (blank noising, arXiv 1703.02573)."""

    def __init__(self, probability, embed_dim):
        super().__init__()
        self.probability = probability
        # Not zeros: an untrained F makes zero contexts of them, and the gradients of their norms explode.
        blank = torch.randn(embed_dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("blank", blank, persistent=False)

    def forward(self, embeddings):
        if not self.training or not self.probability:
            return embeddings
        hidden = torch.rand(*embeddings.shape[:-1], 1, device=embeddings.device) < self.probability
        blank = self.blank * embeddings.detach().float().std()
        return torch.where(hidden, blank.to(embeddings.dtype), embeddings)


class TokenLayer(nn.Module):
    """u <- LN(u + MLP([c; u])): where the head reads the context."""

    def __init__(self, context_dim, embed_dim, dropout):
        super().__init__()
        width = context_dim + embed_dim
        wide, narrow = nn.Linear(width, width), nn.Linear(width, embed_dim)
        self.mlp = nn.Sequential(Dropout(dropout), wide, nn.GELU(), Dropout(dropout), narrow)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, context, stream):
        return normed(self.norm, stream + self.mlp(torch.cat([context, stream], dim=-1)))


class TokenPredictor(nn.Module):
    """Embedding and head, which every model has; context and stream are made by the classes that inherit it.

    Args:
        settings: embed_dim, token_layers, dropouts, tie_weights (newllm.config.ModelSettings).
        vocab_size: V. context_dim: C of what the head reads; None: no context, and no layers to read one.
    """

    def __init__(self, settings, vocab_size, context_dim):
        super().__init__()
        self.vocab_size, self.context_dim, self.embed_dim = vocab_size, context_dim or 0, settings.embed_dim
        self.embedding = nn.Embedding(vocab_size, settings.embed_dim)
        self.token_layers = nn.ModuleList()
        for _ in range(0 if context_dim is None else settings.token_layers):
            self.token_layers.append(TokenLayer(context_dim, self.embed_dim, settings.dropout))
        self.output = None if settings.tie_weights else nn.Linear(settings.embed_dim, vocab_size, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size))
        self.token_dropout = TokenDropout(settings.token_dropout, settings.embed_dim)

    def hidden(self, context, stream):
        """Head up to the logits: (c_t [..., C], u_t [..., E]) -> h [..., E]."""
        for layer in self.token_layers:
            stream = layer(context, stream)
        return stream

    def output_weights(self):
        """(matrix [V, E], bias [V]) such that logits = h @ matrix.T + bias."""
        return (self.embedding if self.output is None else self.output).weight, self.output_bias

    def logits(self, context, stream):
        """(c_t, u_t) -> logits [..., V]. Training takes the loss in chunks instead (see cross_entropy.py)."""
        return functional.linear(self.hidden(context, stream), *self.output_weights())

    @torch.no_grad()
    def start_at_frequencies(self, ids):
        """Output bias: the log of each id's frequency (one more of each), so a unigram before training."""
        counts = torch.bincount(ids.flatten().long(), minlength=self.vocab_size) + 1
        self.output_bias.copy_((counts / counts.sum()).log())

    def freeze_embedding(self, pretrained):
        """Take given vectors [V, E] for good, scaled as a whole for the logits: F norms embeddings anyway."""
        vectors = pretrained.float()
        scale = ALIGNED_LOGIT / (self.embed_dim**0.5 * vectors.norm(dim=1).mean())
        self.embedding.weight = nn.Parameter(scale * vectors, requires_grad=False)

    def context_parameters(self):
        """Parameters that move the contexts: what Phase 1 trains. Here none."""
        return []

    def head_parameters(self):
        """All others that may train: token layers, output, and the embedding where it may."""
        context = set(self.context_parameters())
        return [p for p in self.parameters() if p.requires_grad and p not in context]

    def frozen_state(self):
        """The part of the state dict that no training changes, by name."""
        names = {"context_embedding"}
        if not self.embedding.weight.requires_grad:
            names.add("embedding.weight")
        return {name: tensor for name, tensor in self.state_dict().items() if name in names}

    def trained_state(self):
        """The rest of the state dict; the two together are what `load_state_dict` wants."""
        frozen = self.frozen_state()
        return {name: tensor for name, tensor in self.state_dict().items() if name not in frozen}


# The language model


class LanguageModel(TokenPredictor):
    """Next-token predictor whose memory is the context c_t.

    Args:
        settings: newllm.config.ModelSettings. vocab_size: V.
        pretrained: optional embedding matrix [V, E]; it is then frozen.
    """

    def __init__(self, settings, vocab_size, pretrained=None):
        super().__init__(settings, vocab_size, settings.context_dim)
        learns_context = settings.model_type == "context"
        self.embed_norm = nn.LayerNorm(settings.embed_dim).requires_grad_(learns_context)
        if settings.model_type == "window":
            self.context_map = Window(settings.context_dim, settings.embed_dim, settings.seed)
        elif settings.model_type == "token":
            self.context_map = NoContext()
        else:
            self.context_map = ContextMap(settings.context_dim, settings.embed_dim, settings.num_layers)
        init_weights(self, settings.init_scale, settings.seed)
        if pretrained is not None:
            self.freeze_embedding(pretrained)
        self.register_buffer("context_embedding", None)
        if settings.freeze_context or not learns_context:
            self.keep_context_embedding()

    def keep_context_embedding(self):
        """Let F read a copy of the embedding from now on: training the embedding then moves no context."""
        self.context_embedding = self.embedding.weight.detach().clone()
        if self.output is not None:
            self.embedding.weight.requires_grad_(False)  # nothing would train it

    def embed(self, ids, fixed=False):
        """Token ids [...] -> normalised embeddings e_t [..., E]; `fixed`: no gradient to the matrix."""
        weight = self.embedding.weight if self.context_embedding is None else self.context_embedding
        vectors = functional.embedding(ids, weight.detach() if fixed else weight)
        return in_compute_type(self.embed_norm(vectors))

    def step(self, context, token, stream=True):
        """One step of F on embeddings: (c_{t-1} [..., C], e_t [..., E]) -> (c_t, u_t or None)."""
        return self.context_map(context, token, stream)

    def cast_step(self):
        """`step` for the many calls of one batch: on CUDA under autocast F's weights are cast here, once."""
        kind = self.output_bias.device.type
        learned = any(True for _ in self.context_map.parameters())
        if kind == "cpu" or not torch.is_autocast_enabled(kind) or not learned:
            return self.step
        weights = cast_parameters(self.context_map)

        def step(context, token, stream=True):
            return functional_call(self.context_map, weights, (context, token), {"stream": stream})

        return step

    def advance(self, ids, state=None):
        """One token further: ids [B], context [B, C] before them -> (context after them, stream, context)."""
        tokens = self.embed(ids)
        context = tokens.new_zeros(len(ids), self.context_dim) if state is None else state
        context, stream = self.step(context, tokens)
        return context, stream, context

    def context_parameters(self):
        """What Phase 1 trains. Of an adapter alone while there is one; a window and no context have none."""
        learned = dict(self.context_map.named_parameters())
        added = [parameter for name, parameter in learned.items() if ".lora_" in name]
        if added or not learned:
            return added
        return [*self.embed_norm.parameters(), *learned.values()]


@torch.no_grad()
def init_weights(model, init_scale, seed):
    """Draw every matrix, from a generator of its own so that nothing else can shift the draw.

    Matrices of F: normal, std init_scale / sqrt(fan-in): small enough for F to contract, unlike a fixed std.
    Of the head: std 1 / sqrt(fan-in). Embedding and output: EMBEDDING_STD. Biases: zero.
    """
    draw = functools.partial(torch.Tensor.normal_, generator=torch.Generator().manual_seed(seed))
    draw(model.embedding.weight, 0, EMBEDDING_STD)
    # The head after F: it must not shift the draw of the context map.
    for part, scale in ((model.context_map, init_scale), (model.token_layers, 1.0)):
        for layer in part.modules():
            if isinstance(layer, nn.Linear):
                draw(layer.weight, 0, scale / layer.in_features**0.5)
                layer.bias.zero_()
    if model.output is not None:
        draw(model.output.weight, 0, EMBEDDING_STD)


# Types under autocast


def in_compute_type(tensor):
    """The tensor in autocast's type, where it is on: one fp32 input would widen all of F."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def normed(norm, values):
    """A layer norm of values in their own type, with statistics in fp32 inside the kernel."""
    # A CPU's autocast leaves layer norms alone, and its kernel takes weights of another type. CUDA's would
    # widen the values and give fp32, which whatever reads it would have to narrow again.
    if values.device.type == "cpu":
        return norm(values)
    with torch.autocast(values.device.type, enabled=False):
        weight, bias = norm.weight.to(values.dtype), norm.bias.to(values.dtype)
        return functional.layer_norm(values, norm.normalized_shape, weight, bias, norm.eps)


def cast_parameters(module):
    """{name: fp32 parameter in the type that autocast computes in here}, with gradient to the parameters."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    kind = torch.get_autocast_dtype(parameters[0].device.type)
    return dict(zip(names, _Cast.apply(kind, *parameters), strict=True))


class _Cast(torch.autograd.Function):
    """fp32 tensors in another type, in one launch for all of them; so are their gradients on the way back."""

    @staticmethod
    def forward(ctx, kind, *tensors):
        ctx.set_materialize_grads(False)  # a weight that nothing has read costs no zeros
        narrow = _converted(tensors, kind)
        pairs = zip(narrow, tensors, strict=True)
        ctx.mark_non_differentiable(*(new for new, tensor in pairs if not tensor.requires_grad))
        return tuple(narrow)

    @staticmethod
    def backward(ctx, *gradients):
        wide = iter(_converted([g for g in gradients if g is not None], torch.float32))
        return None, *(None if g is None else next(wide) for g in gradients)


def _converted(tensors, kind):
    new = [torch.empty_like(tensor, dtype=kind) for tensor in tensors]
    torch._foreach_copy_(new, list(tensors))
    return new
