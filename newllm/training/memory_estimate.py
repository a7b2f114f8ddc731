"""What a run holds in memory at each moment that can be its largest: arithmetic from the configuration alone.

A thing is a list of tensor sizes in bytes, as code and autograd keep them: in mixed precision a linear layer saves its
input in half precision, and weights cast to it live as long as the graph.
Letters: n tokens of a batch, C context width, E embedding width, W = C + E, V vocabulary.
"""

from dataclasses import dataclass

from newllm.data.order import batch_count
from newllm.data.vocabulary import GPT2_SIZE, WORDLLAMA_SIZE, tokenizer_choice
from newllm.evaluate import RANK_TOKENS, SEQUENCES_AT_A_TIME
from newllm.fixed_point.diagnostics import PROBE_DIMS, PROBE_LAGS
from newllm.models.adapter import RANKS
from newllm.models.cross_entropy import CACHE_ELEMENTS, CHUNK_ELEMENTS
from newllm.training.device import STORAGE_DTYPE

HEAP_LIMIT = 32 << 20  # bytes; a block of this size has pages of its own, smaller ones lie in the heap
# torch aligns a block to 64 bytes, for which glibc wants a hole larger than the block: what a freed one leaves is too small
# for the next of its size, and the heap outgrows what is alive in it, by a quarter to a half where it was measured.
FRAGMENTATION = 0.3


@dataclass(frozen=True)
class Moment:
    """What is alive at one time: thing -> sizes of its tensors in bytes."""

    stage: str
    name: str
    things: dict


def predict(moments, base, cuda=False):
    """Bytes at each moment.

    Args:
        base: bytes of the process with the libraries loaded and in use.

    Returns:
        List of (moment, {thing: bytes}); the values of a dict add up to the memory held then.
    """
    rows, stage, heap = [], None, 0
    for moment in moments:
        things = {"process and libraries": base} | {name: sum(sizes) for name, sizes in moment.things.items()}
        if not cuda:
            small = sum(size for sizes in moment.things.values() for size in sizes if size < HEAP_LIMIT)
            # What is freed stays in the heap until the stage ends.
            stage, heap = moment.stage, max(heap if moment.stage == stage else 0, (1 + FRAGMENTATION) * small)
            things["free within the heap"] = round(heap - small)
        rows.append((moment, things))
    return rows


def vocabulary(config):
    """Ids of the tokenizer; "auto", and a pretrained one that has yet to be read, count as gpt2, the larger."""
    return {"bpe": config.vocab_size, "wordllama": WORDLLAMA_SIZE}.get(tokenizer_choice(config), GPT2_SIZE)


def predicted_peak(config, vocab_size, precision, libraries_mb, cuda=False):
    """MB of the largest moment, None for a baseline or a control; other arguments as of `moments`."""
    if config.model_type != "context":
        return None
    rows = predict(moments(config, vocab_size, precision, cuda), 1e6 * libraries_mb, cuda)
    return max(sum(things.values()) for _, things in rows) / 1e6


class Sizes:
    """Sizes in bytes of what the network of a configuration makes, on a device in a precision.

    Args:
        precision: "fp32", "bf16" or "fp16", as in effect. cuda: whether the device is one.
    """

    def __init__(self, config, vocab_size, precision, cuda=False):
        self.config, self.V, self.cuda = config, vocab_size, cuda
        self.C, self.E, self.W = config.context_dim, config.embed_dim, config.context_dim + config.embed_dim
        self.half = STORAGE_DTYPE[precision].itemsize  # of products, and of contexts between steps
        self.mixed = precision != "fp32"
        self.trains_output = not config.tie_weights or config.embeddings == "random"
        self.trains_embedding = config.embeddings == "random" and (config.tie_weights or not config.freeze_context)
        self.between = 4 if cuda else self.half  # layers: CUDA normalises in fp32, a CPU in the type of what comes

    def parameters(self):
        """(context map, head, frozen tensors): lists of bytes."""
        c, C, E, W, V = self.config, self.C, self.E, self.W, self.V
        context = [E, E] + c.num_layers * [W * W, W, C, C, E, E]
        matrices = self.trains_embedding + (not c.tie_weights)
        head = c.token_layers * [W * W, W, W * E, E, E, E] + matrices * [V * E] + [V]
        frozen = ((not self.trains_embedding) + c.freeze_context) * [V * E]
        return tuple([4 * size for size in part] for part in (context, head, frozen))

    def fine_tuned(self, context):
        """Of the context map's parameters, those that Phase 2 trains: itself, or an adapter's matrices."""
        rank = self.config.adapter_rank or RANKS[-1][1]
        return self.config.num_layers * 2 * [4 * rank * self.W] if self.config.context_adapter != "none" else context

    def batch_tokens(self, batch_size):
        """Tokens of the largest batch of an epoch."""
        c = self.config
        return -(-c.num_samples // batch_count(c.num_samples, batch_size, c.min_batches)) * c.max_seq_length

    def stored(self, samples, width):
        """Of contexts or features kept for all samples; what is beyond the limit lies in a file."""
        size = samples * self.config.max_seq_length * width * self.half
        return [size] if size <= self.config.context_memory_mb * 1e6 else []

    def snapshot(self, tensors):
        """Of the copy that is being saved while training goes on; it lies in the host's memory."""
        return tensors if self.config.save_checkpoint and not self.cuda else []

    def casts(self, weights):
        """Half-precision copies of weights of so many elements, which the graph keeps."""
        return [elements * self.half for elements in weights] if self.mixed else []

    def embedding(self, n, fixed):
        """Of tokens, before and after the norm, and its statistics; where it trains, ids and a gradient of its own too."""
        sizes = [n * self.E * 4, n * self.E * self.half, 8 * n]
        return sizes if fixed or not self.trains_embedding else [*sizes, 8 * n, self.V * self.E * 4]

    def sweeps(self, n, count=1, stream=True):
        """What sweeps save for the backward pass; `stream`: whether the last one makes streams, as the others do not."""
        C, E, W, half, layers = self.C, self.E, self.W, self.half, self.config.num_layers
        cut = count - stream  # sweeps whose last layer computes its context half only
        whole = [n * W * half, n * W * half, n * C * self.between, 8 * n, n * E * self.between, 8 * n]
        part = [n * W * half, n * C * half, n * C * self.between, 8 * n]
        weights = (layers - (not stream)) * [W * W] + cut * [C * W]
        return (layers * count - cut) * whole + cut * part + self.casts(weights)

    def head(self, n, frozen):
        """What the head saves for the backward pass: less in the first layer where contexts need no gradient."""
        W, E = self.W, self.E
        masks = 2 * [n * W * (1 if self.cuda else self.half)] if self.config.dropout else []
        inputs = [*3 * [n * W * self.half], n * E * self.between, 8 * n]  # of both products, of GELU, of the norm
        sizes = self.config.token_layers * (masks + inputs) + self.casts(self.config.token_layers * [W * W, W * E])
        return [*sizes[bool(frozen and masks) :], n * E * self.between]

    def logits(self, n, training):
        """Of the cross-entropy: a chunk, and in training its softmax in parts and both gradients, else its softmax."""
        chunks = -(-n // max(1, CHUNK_ELEMENTS // self.V))
        chunk, weight = -(-n // chunks) * self.V, self.V * self.E
        sizes = [chunk * self.half, *self.casts([weight])]
        if not training:
            return sizes + (1 + self.mixed) * [chunk * 4]
        gradient = [weight * self.half, weight * 4] if self.trains_output else []
        return [*sizes, 4 * (chunk if self.cuda else min(chunk, CACHE_ELEMENTS)), n * self.E * self.half, *gradient]

    def sequential(self, sequences, width):
        """Evaluation step by step: embeddings, the result of each step, and all of them as one tensor; `width` bytes each."""
        T, C, E = self.config.max_seq_length, sequences * self.C * width, sequences * self.E * width
        return [T * E, *T * [C, E], T * C, T * E]

    def evaluation(self):
        """Contexts of equally many training and validation samples, in fp32, and the probes for past tokens."""
        config, C, T = self.config, self.C, self.config.max_seq_length
        count = max(1, min(-(-RANK_TOKENS // T), config.num_samples, config.val_samples))
        lags = min(PROBE_LAGS, T // 2)
        probed, targets = count * (T - lags), lags * min(PROBE_DIMS, self.E)
        probes = 6 * [probed * targets * 4] + 3 * [probed * C * 4] + 2 * [C * targets * 4]
        return 2 * [count * T * C * 4, count * T * self.E * 4] + max(probes, self.sequential(count, 4), key=sum)

    def validation(self, frozen):
        """Next-token loss on validation samples, as many at a time as the evaluation takes: the largest of its steps."""
        sequences, width = min(SEQUENCES_AT_A_TIME, self.config.val_samples), self.half if frozen else 4
        n = sequences * self.config.max_seq_length
        contexts = [n * self.C * width, n * self.E * width]
        layers = [n * self.W * width, *2 * [n * self.W * self.half]] * bool(self.config.token_layers)
        scores = [n * self.E * width, *self.logits(n, training=False)]
        made = [] if frozen else self.sequential(sequences, self.between)
        return max(contexts + layers, contexts + scores, made, key=sum)


def moments(config, vocab_size, precision, cuda=False):
    """The moments of a run, in its order. On CUDA they are those of the device."""
    sizes = Sizes(config, vocab_size, precision, cuda)
    context, head, frozen = sizes.parameters()
    weights = {"weights": context + head + frozen}
    control = context + head + max(frozen, [4 * sizes.V * sizes.E], key=sum)  # which keeps what F reads
    found = _phase2(sizes, "untrained", {"weights": weights["weights"] + control}, context, head, frozen=True)
    found += _phase1(sizes, weights, context, head)
    if config.phase == "both":
        found += _phase2(sizes, "phase2", weights, context, head, config.freeze_context)
    return found


def _phase1(sizes, held, context, head):
    config, C = sizes.config, sizes.C
    n, contexts = sizes.batch_tokens(config.phase1_batch_size), sizes.stored(config.num_samples, C)
    held = held | {"optimizer": 2 * context}
    state = held | {"contexts": contexts, "copies of weights": context}  # the first ones, and those before a last step
    snapshot = {"snapshot being saved": sizes.snapshot(3 * context + head + contexts)}
    batch = 2 * [n * C * sizes.half] + 2 * [n * C * sizes.between]  # contexts old and new
    loss = 4 * [n * C * 4 + C * C * 4]  # in fp32: change, contexts, centred, gradient; covariance and its factors
    step = {"activations": sizes.sweeps(n, stream=False) + sizes.embedding(n, fixed=True) + batch + loss}
    gradients = {"gradients": context}
    return [
        Moment("phase1", "step", state | step | snapshot),
        Moment("phase1", "save", state | gradients | {"copies of weights": 2 * context} | snapshot),
        Moment("phase1", "evaluation", held | gradients | {"evaluation": sizes.evaluation()}),
    ]


def _phase2(sizes, stage, held, context, head, frozen):
    config = sizes.config
    trained, trains = context + head, head if frozen else sizes.fine_tuned(context) + head
    n = sizes.batch_tokens(config.phase2_batch_size)
    made, found = [], []
    if frozen:
        features = [size for count in (config.num_samples, config.val_samples) for size in sizes.stored(count, sizes.W)]
        held, made = held | {"contexts": features}, [n * sizes.C * sizes.half, n * sizes.E * sizes.half]
        part = min(SEQUENCES_AT_A_TIME, max(config.num_samples, config.val_samples))
        found = [Moment(stage, "contexts made", held | {"evaluation": sizes.sequential(part, sizes.half)})]
    else:
        made = (
            sizes.sweeps(n, max(1, config.gradient_sweeps))
            + sizes.embedding(n, fixed=False)
            + [n * sizes.C * sizes.between]
        )
    state = held | {"optimizer": 2 * trains, "copies of weights": trained}  # those of the best epoch
    snapshot = {"snapshot being saved": sizes.snapshot(trained + 2 * trains)}
    gradients = {"gradients": trains}
    step = {"activations": made + sizes.head(n, frozen), "logits": sizes.logits(n, training=True)}
    return [
        *found,
        Moment(stage, "step", state | step | snapshot),
        Moment(stage, "save", state | gradients | snapshot),
        Moment(stage, "validation", state | gradients | {"evaluation": sizes.validation(frozen)}),
    ]
