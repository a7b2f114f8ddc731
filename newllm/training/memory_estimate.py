"""What a run holds in memory in each of its stages: arithmetic from the configuration, give or take 15 %.

Weights, gradients, moments and stored contexts are exact. Beside them a step or a validation holds a number
of floats a token, measured for each kind of network. What the process takes without any of it is measured, at
the start. Not counted: a GPU's libraries, torch.compile.
"""

import math

import torch
from torch.nn import functional

from newllm.data.order import batch_count
from newllm.data.tokens import GPT2_SIZE, WORDLLAMA_SIZE, tokenizer_choice
from newllm.evaluate import RANK_TOKENS, SEQUENCES_AT_A_TIME
from newllm.fixed_point.diagnostics import PROBE_DIMS, PROBE_LAGS
from newllm.models.baselines import build_model
from newllm.models.cross_entropy import CHUNK_ELEMENTS
from newllm.saving.teachers import named_teachers, teacher_file
from newllm.saving.trained import retrieval_bytes
from newllm.training.plan import training_samples
from newllm.training.runtime import memory_mb, peak_memory_mb
from newllm.training.step import make_optimizer

THINGS = (
    "libraries", "weights", "gradients, moments", "best, in saving", "contexts", "looked up", "activations",
    "logits",
)  # fmt: skip
# Floats of a token for each unit of width: of a layer, kept for the backward pass; of a pass without one.
KEPT = {"context": 5.6, "gru": 8.4, "lstm": 17.3, "transformer": 28.5, "window": 0.0, "token": 0.0}
FORWARD = {"context": 2.6, "gru": 3.6, "lstm": 3.6, "transformer": 17.0, "window": 2.6, "token": 2.6}
HEAD, LOSS, SHARES = 4.3, 8.0, 3.0  # kept of a layer of the head, of Phase 1's loss, of attention's shares
TARGET = 200  # bytes of a place whose targets are drawn: the draws, and the counts they come from
TAUGHT, SAID, ASKED = 256, 12, 32  # the same with teachers; of a probability they give; samples at a time
NEIGHBOURS = 256  # that a place finds in the training text
FOUND, FITTED = 10, 36  # bytes of a place that another is compared with: as it is found, and while fitting
PLACED = 40  # bytes of a place of the training text while its key is put among the others
HALF = 0.7  # of what is kept, where products are made in half precision
SCATTERED_MB = 70.0  # of the saving thread, and of freed memory between what is in use


def memory_table(config, vocab_size, runtime):
    """{stage: {thing: MB}} in this process of the stages that train, in their order."""
    C, E, T, kind = config.context_dim, config.embed_dim, config.max_seq_length, config.model_type
    on_cpu, itemsize = runtime.device.type == "cpu", runtime.storage_dtype.itemsize
    samples, processes = training_samples(config), runtime.group.size
    owned = [-(-count // processes) for count in (samples, config.val_samples)]
    validated = T * min(SEQUENCES_AT_A_TIME, config.val_samples)
    model = sketch(config, vocab_size)
    parts = model.context_parameters(), model.head_parameters(), model.state_dict().values()
    context, head, weights = (sum(tensor.nbytes for tensor in part) for part in parts)
    libraries = libraries_mb(kind, runtime)
    in_layer, in_head, read = KEPT[kind] * C, config.token_layers * HEAD * (C + E), C + E
    if kind == "transformer":
        in_layer, in_head, read = KEPT[kind] * E, 0.0, E
        if config.dropout or config.attention == "math":  # then each head's shares of T tokens are kept
            in_layer += SHARES * T * E // math.gcd(E, 64)

    def step(batch_size, floats, vocabulary=vocab_size):
        """Bytes of (activations, logits) of a training step; the logits with the output's gradient."""
        batch = -(-samples // batch_count(samples, batch_size, config.min_batches))
        tokens = T * -(-batch // processes)
        kept = 4 * tokens * floats * (1.0 if itemsize == 4 else HALF)
        if vocabulary and config.label_smoothing:
            kept += TARGET * samples * T
        return kept, min(tokens * vocabulary, CHUNK_ELEMENTS) * itemsize + 8 * vocabulary * E

    def stage(trained, stored, *works, copies=1):
        """What is held all the time, and the largest of the works."""
        kept = sum(size for size in stored if size <= 1e6 * config.context_memory_mb)  # larger: in files
        saving = 3 * trained if config.save_checkpoint and on_cpu else 0  # beside the best weights so far
        held = copies * weights, 3 * trained, trained + saving, kept, 0, *max(works, key=sum)
        return dict(zip(THINGS, (libraries, *(size / 1e6 for size in held)), strict=True))

    chunks = -(-validated * vocab_size // CHUNK_ELEMENTS)
    validation = 4 * validated * read * FORWARD[kind], validated * vocab_size // chunks * (8 + itemsize)
    probed = T * min(-(-RANK_TOKENS // T), samples, config.val_samples)
    probes = 4 * probed * (4 * read + 5.5 * min(PROBE_LAGS, T // 2) * min(PROBE_DIMS, E)), 0
    features = [count * T * (C + E) * itemsize for count in owned]
    frozen = head, features, step(config.phase2_batch_size, in_head), validation
    in_layers, table = config.num_layers * in_layer, {}
    if context and config.untrained_control:
        table["untrained"] = stage(*frozen, copies=2)
    if context:
        work = step(config.phase1_batch_size, in_layers + LOSS * C, vocabulary=0)
        table["phase1"] = stage(context, [owned[0] * T * C * itemsize], work, probes)
    if config.phase == "both" and (kind in ("window", "token") or (context and config.freeze_context)):
        table["phase2"] = stage(*frozen)
    elif config.phase == "both":
        passes = max(1, config.gradient_sweeps) if context else 1
        work = step(config.phase2_batch_size, passes * in_layers + in_head)
        table["phase2"] = stage(head + context, [], work, validation, probes if context else work)
    if named_teachers(config):
        add_teachers(table["phase2"], config, vocab_size, samples)
    if config.phase == "both" and config.looks_up:
        held = looking_up(config, vocab_size, samples, read * FORWARD[kind])
        held = dict(zip(THINGS, (0, weights, 0, 0, 0, *held), strict=True))
        table["retrieval"] = {name: size / 1e6 for name, size in held.items()} | {"libraries": libraries}
    return table


def add_teachers(held, config, vocab_size, samples):
    """Add to Phase 2's {thing: MB} its teachers, their draws, and what they say of some samples."""
    files = [teacher_file(path) for path, _ in named_teachers(config)]
    held["weights"] += sum(file.stat().st_size for file in files if file.is_file()) / 1e6
    held["activations"] += (TAUGHT - TARGET) * samples * config.max_seq_length / 1e6
    asked = min(ASKED, samples) * config.max_seq_length
    held["logits"] = max(held["logits"], SAID * asked * vocab_size / 1e6)


def looking_up(config, vocab_size, samples, floats):
    """Bytes of (what is looked up, activations, logits) in the stage after Phase 2, at its largest moment.

    Args:
        samples: to train on. floats: of a token that the network reads, of all its layers.
    """
    T, validated = config.max_seq_length, config.val_samples
    built = retrieval_bytes(config, vocab_size, samples * T)
    read = T * min(SEQUENCES_AT_A_TIME // 4, samples) * (floats + config.context_dim + 2 * config.embed_dim)
    compared = NEIGHBOURS * ("knn" in config.looks_up) + T * ("cache" in config.looks_up)
    evidence = validated * T * compared
    logits = 16 * T * min(SEQUENCES_AT_A_TIME // 16, validated) * vocab_size
    storing = built + PLACED * samples * T, 4 * read, 0
    return max(storing, (built, FOUND * evidence, logits), (built, FITTED * evidence, 0), key=sum)


def predicted_peak(config, vocab_size, runtime):
    """MB at the largest moment of a run in this process, on a CPU never less than it has held already."""
    peak = max(sum(held.values()) for held in memory_table(config, vocab_size, runtime).values())
    return max(peak, peak_memory_mb()) if runtime.device.type == "cpu" else peak


def usable_memory(config, runtime):
    """MB that a run may take of the device."""
    share = config.gpu_memory_fraction if runtime.device.type == "cuda" else 1
    return share * runtime.memory / 1e6


def verdict(peak, usable):
    """Whether a run with a peak fits into the memory that it may take (both in MB), in words."""
    fits = "fits" if peak <= usable else "does not fit"
    return f"{peak:,.0f} MB of {usable:,.0f} MB, so the run {fits}: margin {usable - peak:,.0f} MB"


def libraries_mb(kind, runtime):
    """MB of this process with all that a training step loads at first use; 0 where a GPU holds the rest."""
    if kind == "transformer":
        import transformers.models.gpt2.modeling_gpt2  # noqa: F401
    weight = torch.nn.Parameter(torch.ones(512, 512))
    optimizer = make_optimizer([([weight], 1.0)], 1e-3, 0.0)
    with runtime.autocast():
        functional.linear(weight.detach(), weight).square().mean().backward()
    optimizer.step()
    torch.linalg.eigvalsh(weight.detach().double())
    return memory_mb()["memory_mb"] + SCATTERED_MB if runtime.device.type == "cpu" else 0.0


def vocabulary(config):
    """Ids of the tokenizer; "auto", and a pretrained one that has yet to be read, count as gpt2's."""
    return {"bpe": config.vocab_size, "wordllama": WORDLLAMA_SIZE}.get(tokenizer_choice(config), GPT2_SIZE)


def sketch(config, vocab_size):
    """The network of a configuration without values: on torch's meta device, where only shapes count."""
    with torch.device("meta"):
        pretrained = None if config.embeddings == "random" else torch.empty(vocab_size, config.embed_dim)
        return build_model(config, vocab_size, pretrained)
