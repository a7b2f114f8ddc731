"""What a run holds in memory at each moment that can be its largest: arithmetic from the configuration alone.

Weights, gradients, moments and stored contexts are exact. What a step or a validation holds besides is a number of floats
for each token, measured once for each kind of network. What the process takes without any of it is measured at the start.
Letters: n tokens of a batch, C context width, E embedding width, V vocabulary, T tokens of a sample.
"""

import math

import torch
from torch.nn import functional

from newllm.data.order import batch_count
from newllm.data.vocabulary import GPT2_SIZE, WORDLLAMA_SIZE, tokenizer_choice
from newllm.evaluate import RANK_TOKENS, SEQUENCES_AT_A_TIME
from newllm.fixed_point.diagnostics import PROBE_DIMS, PROBE_LAGS
from newllm.models.baselines import BASELINES, build_model
from newllm.models.cross_entropy import CHUNK_ELEMENTS
from newllm.training.runtime import STORAGE_DTYPE, memory_mb, peak_memory_mb
from newllm.training.step import make_optimizer

# Floats of a token that autograd keeps, in fp32 and where products are made in half precision: for each layer and unit of its
# width (of the context map: and sweep), for each layer of the head and unit of C + E, and of Phase 1's loss for each of C.
LAYER = {"context": (5.6, 3.3), "gru": (8.4, 6.2), "lstm": (17.3, 14.0), "transformer": (28.5, 18.0)}
HEAD, LOSS, SHARES = (
    (4.3, 3.0),
    8.0,
    (3.0, 2.0),
)  # SHARES: for each head and token that an attention which keeps them looks at
# The same of a pass without gradient, for each unit of what the head reads; contexts that are kept: as a window's.
FORWARD = {"context": (4.75, 4.75), "gru": (3.2, 3.2), "lstm": (3.2, 3.2), "transformer": (17.0, 8.5)}
FORWARD |= dict.fromkeys(("window", "token"), (2.4, 2.4))
# Blocks of this size have pages of their own. Of smaller ones, what is freed is often too little for the next, so that the
# heap outgrows what is alive in it, by a factor that was measured; it falls to 1 towards blocks that are large.
LARGE, HOLES = 32 << 20, 1.7
SCATTERED_MB = 30.0  # of the saving thread, and of freed memory between what is in use, which does not go back after a stage


def libraries_mb(config, runtime):
    """MB of this process with all that a training step loads at first use; 0 for a GPU, and where nothing tells."""
    if runtime.device.type == "cuda":
        return 0.0
    if config.model_type == "transformer":
        import transformers.models.gpt2.modeling_gpt2  # noqa: F401
    weight = torch.nn.Parameter(torch.ones(512, 512))
    optimizer = make_optimizer([([weight], 1.0)], 1e-3, 0.0)
    with runtime.autocast():
        functional.linear(weight.detach(), weight).square().mean().backward()
    optimizer.step()
    torch.linalg.eigvalsh(weight.detach().double())
    return (memory_mb()["memory_mb"] or 0.0) + SCATTERED_MB


def vocabulary(config):
    """Ids of the tokenizer; "auto", and a pretrained one that has yet to be read, count as gpt2, the larger."""
    return {"bpe": config.vocab_size, "wordllama": WORDLLAMA_SIZE}.get(tokenizer_choice(config), GPT2_SIZE)


def predicted_peak(config, vocab_size, runtime):
    """MB at the largest moment of a run in this process, never less than it has held already."""
    cuda = runtime.device.type == "cuda"
    found = moments(config, vocab_size, runtime.precision, cuda)
    peak = libraries_mb(config, runtime) + max(sum(things.values()) for *_, things in found) / 1e6
    return peak if cuda else max(peak, peak_memory_mb())


def left_out(config, cuda):
    """What the prediction does not count, which makes it a lower bound; "" where measured peaks lie within 15 % of it."""
    if cuda:
        return "what a GPU's allocator and libraries need, where nothing was measured"
    return "what the compiler and its code take" if config.compile else ""


def moments(config, vocab_size, precision, cuda=False):
    """The moments of a run in its order: list of (stage, moment, {thing: bytes}), libraries aside.

    Args:
        precision: "fp32", "bf16" or "fp16", as in effect. cuda: whether the memory is that of a GPU.
    """
    C, E, V, T, kind = (
        config.context_dim,
        config.embed_dim,
        vocab_size,
        config.max_seq_length,
        config.model_type,
    )
    half, mixed = STORAGE_DTYPE[precision].itemsize, precision != "fp32"
    context, head, weights = _parameters(config, V)
    read, map_floats, head_floats = _floats(config, mixed)
    n = T * min(-(-RANK_TOKENS // T), config.num_samples, config.val_samples)
    measured = 4 * n * (4 * read + 5.5 * min(PROBE_LAGS, T // 2) * min(PROBE_DIMS, E))  # contexts, by probes
    found = []

    def add(stage, moment, held, **work):
        found.append((stage, moment, {"weights": weights} | held | work))

    def training(trained, moments, rows):
        """Gradients and moments; best or earlier weights and the snapshot being saved; contexts unless in a file."""
        kept = [size for size in (T * half * row for row in rows) if size <= config.context_memory_mb * 1e6]
        copies = trained + (trained + moments) * (config.save_checkpoint and not cuda)
        return {"optimizer": 1.5 * moments, "copies of weights": copies, "contexts": sum(kept)}

    def in_heap(n, floats):
        """Bytes of so many floats for each of n tokens, with the holes between them."""
        small = 0.0 if cuda else min(1.0, max(0.0, 2.5 * (1 - n * max(read, 2 * E) * half / LARGE)))
        return 4 * n * floats * (1 + small * (HOLES - 1))

    def step(stage, held, batch_size, floats, logits=0):
        n = T * -(-config.num_samples // batch_count(config.num_samples, batch_size, config.min_batches))
        chunk = min(n * V, CHUNK_ELEMENTS) * (half + 4 * cuda) + 8 * V * E  # and the output's gradient, twice
        add(stage, "step", held, activations=in_heap(n, floats), logits=chunk * logits)
        return in_heap(n, floats)

    def phase2(stage, frozen):
        rows = [samples * read for samples in (config.num_samples, config.val_samples)] if frozen else []
        tuned = 0 if frozen or config.context_adapter != "none" else context
        held = training(context + head, 2 * (head + tuned), rows)
        if stage == "untrained":
            held |= {"copy of the network": weights + 4 * V * E}
        sweeps = 0 if frozen else config.gradient_sweeps or 1 if kind == "context" else 1
        freed = step(stage, held, config.phase2_batch_size, sweeps * map_floats + head_floats, 1)
        floats = read * FORWARD["window" if frozen else kind][mixed]
        if frozen:
            made = in_heap(T * min(SEQUENCES_AT_A_TIME, config.num_samples), floats)
            add(stage, "contexts made", held, evaluation=made)
        n = T * min(SEQUENCES_AT_A_TIME, config.val_samples)
        logits = n * V // -(-n // max(1, CHUNK_ELEMENTS // V)) * (8 + half * mixed)
        work = {"evaluation": in_heap(n, floats), "logits": logits}
        if (
            kind in BASELINES and not cuda
        ):  # logits are blocks too large for most of what a step has left free
            work["free within the heap"] = 0.7 * min(freed, work["logits"])
        add(stage, "validation", held, **work)
        if kind == "context" and not frozen:
            add(stage, "contexts measured", held, evaluation=measured)

    if kind == "context":
        add("untrained", "contexts measured", {}, evaluation=measured)
        if config.untrained_control:
            phase2("untrained", frozen=True)
        held = training(context, 2 * context, [config.num_samples * C])
        step("phase1", held, config.phase1_batch_size, map_floats + LOSS * C)
        add("phase1", "contexts measured", held, evaluation=measured)
    if config.phase == "both" or kind != "context":
        phase2("phase2", frozen=kind not in BASELINES and (kind != "context" or config.freeze_context))
    return found


def _floats(config, mixed):
    """Of a token: width that the head reads, and floats that autograd keeps of a pass (context map: of a sweep) and of the head."""
    C, E, layers, kept = (
        config.context_dim,
        config.embed_dim,
        config.num_layers,
        LAYER.get(config.model_type, (0, 0)),
    )
    if config.model_type != "transformer":
        return C + E, layers * kept[mixed] * C, config.token_layers * HEAD[mixed] * (C + E) + E
    shares = (
        config.max_seq_length * (E // math.gcd(E, 64)) if config.dropout or config.attention == "math" else 0
    )
    return E, layers * (kept[mixed] * E + SHARES[mixed] * shares), E


def sketch(config, vocab_size):
    """The network of a configuration without values: on torch's meta device, where only shapes take memory."""
    with torch.device("meta"):
        pretrained = None if config.embeddings == "random" else torch.empty(vocab_size, config.embed_dim)
        return build_model(config, vocab_size, pretrained)


def _parameters(config, vocab_size):
    """Bytes of the context map's and the head's trained parameters, and of all that the network holds."""
    model = sketch(config, vocab_size)
    parts = model.context_parameters(), model.head_parameters(), model.state_dict().values()
    return tuple(sum(tensor.nbytes for tensor in part) for part in parts)
