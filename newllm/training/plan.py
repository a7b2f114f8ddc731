"""What a run will do, stage by stage, and which of its settings change nothing beside the others."""

from newllm.data.order import batch_count
from newllm.data.samples import cut_size
from newllm.models.baselines import BASELINES, Baseline
from newllm.models.pretrained import adapter_rank


class Flops:
    """Floating-point operations a token, of matrix products alone, from the sizes of the network."""

    def __init__(self, config, vocab_size):
        width = config.context_dim + config.embed_dim
        self.map = 2 * config.num_layers * width**2
        self.contexts = self.map - 2 * config.embed_dim * width  # without the last layer's token stream
        covariance = 2 * config.context_dim**2
        self.head_first = 2 * config.token_layers * width**2
        self.head_rest = 2 * (config.token_layers * width * config.embed_dim + config.embed_dim * vocab_size)
        self.phase1 = 3 * (self.contexts + covariance)
        self.frozen = 2 * self.head_first + 3 * self.head_rest  # the gradient stops at the contexts
        # The trajectory once, then sweeps with gradient; the first sweep's gradient stops at its contexts.
        sweeps = config.gradient_sweeps
        through_time = (3 * sweeps - 2) * self.contexts + 3 * self.map if sweeps else 3 * self.map
        self.fine_tuned = through_time + 3 * (self.head_first + self.head_rest)
        self.generation = self.map + self.head_first + self.head_rest


def make_plan(config, num_samples, model, runtime):
    """The stages that train, in order.

    Args:
        num_samples: to train on. model: as it is before any training.

    Returns:
        {stage: {"passes" over the samples and "tokens" at most, "batches" of a pass, "samples" of the largest
        one, "asked" by the setting, "trainable" parameters, "work": operations a token}}.
    """
    context, head = _count(model.context_parameters()), _count(model.head_parameters())
    flops = None if isinstance(model, Baseline) else Flops(config, model.embedding.num_embeddings)
    frozen = config.freeze_context or not context
    plan = {}

    def add(stage, passes, asked, trainable, work):
        batches = batch_count(num_samples, asked, config.min_batches)
        plan[stage] = dict(
            passes=passes, tokens=passes * num_samples * config.max_seq_length, batches=batches,
            samples=-(-num_samples // batches), asked=asked, trainable=trainable, work=work,
        )  # fmt: skip

    if context and config.untrained_control:
        trainable = head
        if model.output is not None and model.embedding.weight.requires_grad:
            # Untied, only the map reads the embedding, and there it is kept as it is.
            trainable -= model.embedding.weight.numel()
        add("untrained", config.phase2_epochs, config.phase2_batch_size, trainable, flops.frozen)
    if context and config.phase1_max_iterations:
        add("phase1", config.phase1_max_iterations, config.phase1_batch_size, context, flops.phase1)
    if config.phase == "both":
        if config.context_adapter != "none":
            rank = adapter_rank(config.adapter_rank, runtime.memory)
            mixes = [layer.mix for layer in model.context_map.layers]
            context = rank * sum(mix.in_features + mix.out_features for mix in mixes)
        trainable = head if frozen else head + context
        work = 1
        if flops:
            work = flops.frozen if frozen else flops.fine_tuned
        add("phase2", config.phase2_epochs, config.phase2_batch_size, trainable, work)
    return plan


def _count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def training_samples(config):
    """Samples that training passes over: those that `tune_share` and `fit_share` take are not among them."""
    samples = config.num_samples
    for setting in ("tune_share", "fit_share"):
        share = getattr(config, setting)
        samples -= cut_size(setting, share, samples) if share else 0
    return max(1, samples)


PHASE1 = "phase1_shuffle phase1_learning_rate phase1_batch_size dist_reg dist_reg_weight context_noise"
CONTEXT = f"{PHASE1} phase1_max_iterations phase1_convergence_threshold phase1_min_converged_ratio init_scale"
TUNING = "context_lr_scale gradient_sweeps"
QUICK = "val_quick_every_n_batches val_quick_frac"
PHASE2 = (
    "phase2_epochs phase2_learning_rate phase2_batch_size warmup_ratio patience weight_decay "
    "label_smoothing dropout"
)
SAVING = "save_every_n_batches save_min_seconds save_every_minutes keep_last backup_dir backup_every_minutes"


def without_effect(config, on_cpu, tokenizer):
    """{setting: why it has no effect beside the others}, whether given or not; the first reason counts.

    Args:
        on_cpu: whether the run computes there. tokenizer: name of the one in effect; "bpe" is trained here.
    """
    c, kind, samples = config, config.model_type, training_samples(config)
    context, fixed, attends = kind == "context", kind in ("window", "token"), kind == "transformer"
    only1, no_phase1, no_layers = c.phase == "1", not c.phase1_max_iterations, not c.token_layers
    fewest = min(c.min_batches, samples)
    compared = {"cache", "knn"} & set(c.looks_up)
    by_tokens = c.given.get("num_tokens", getattr(type(c), "num_tokens", 0))
    this, later = f"model_type '{kind}'", "it belongs to Phase 2, which phase 1 leaves for a later run"
    smaller = f"min_batches {c.min_batches} makes batches of {-(-samples // fewest)} of {samples} samples"
    table = [
        (f"{CONTEXT} {TUNING} untrained_control", not context, f"{this} has no context to learn"),
        ("freeze_context token_dropout compile", fixed, f"{this} has no context map that trains"),
        ("context_memory_mb", kind in BASELINES, f"{this} keeps no contexts of the samples"),
        ("num_layers", fixed, f"{this} has no layers below the head"),
        ("context_dim token_layers", attends, "a transformer has width embed_dim, and no layers of the head"),
        ("context_dim", fixed and no_layers, "the head reads no context (token_layers 0)"),
        ("dropout", kind not in BASELINES and no_layers, "the head has no layers (token_layers 0)"),
        ("attention", not attends, f"{this} has no attention"),
        ("adapter_rank", c.context_adapter == "none", "there is no adapter (context_adapter)"),
        (PHASE1, no_phase1, "there is no Phase 1 (phase1_max_iterations 0)"),
        ("dist_reg", not c.dist_reg_weight, "the regularizer counts nothing (dist_reg_weight 0)"),
        (f"{TUNING} token_dropout freeze_context context_adapter adapter_rank", only1, later),
        (f"{PHASE2} {QUICK} whiten_context", only1 and not (context and c.untrained_control), later),
        (f"{TUNING} token_dropout", c.freeze_context, "contexts are frozen (freeze_context)"),
        ("teachers", only1, later),
        ("teachers", not c.label_smoothing, "label_smoothing 0 leaves them no share"),
        ("retrieval", c.whiten_context, "whitened contexts are those of no other text (whiten_context)"),
        ("retrieval_keys retrieval_window", not c.looks_up, "nothing is looked up (retrieval)"),
        ("retrieval_keys", not compared, "no places are compared (retrieval)"),
        ("retrieval_keys", only1 and not (context and c.untrained_control), later),
        ("retrieval_window", "cache" not in compared, "the text so far is not looked up (retrieval)"),
        ("compile", c.freeze_context and no_phase1, "nothing trains the context map (freeze_context)"),
        ("phase1_batch_size", samples // c.phase1_batch_size < fewest, smaller),
        ("phase2_batch_size", samples // c.phase2_batch_size < fewest, smaller),
        ("val_quick_frac", not c.val_quick_every_n_batches, "there are no quick checks"),
        (QUICK, batch_count(samples, c.phase2_batch_size, c.min_batches) == 1, "an epoch is one batch"),
        ("patience", c.phase2_epochs <= 2, f"{c.phase2_epochs} epochs leave none to stop before"),
        ("num_samples", "num_samples" in c.given and by_tokens, "num_tokens says how many"),
        ("vocab_size", tokenizer != "bpe", f"the vocabulary is that of the tokenizer {tokenizer}"),
        ("val_samples", c.tune_share, "validation takes training samples (tune_share)"),
        ("gpu_memory_fraction", on_cpu, "the run computes on the CPU"),
        (SAVING, not c.save_checkpoint, "nothing is saved (save_checkpoint is off)"),
        ("backup_every_minutes", not c.backup_dir, "there are no second copies (backup_dir)"),
    ]
    reasons = {}
    for names, applies, why in table:
        for name in names.split() if applies else ():
            reasons.setdefault(name, why)
    return reasons


def unused_lines(config, on_cpu, tokenizer):
    """A line for each setting that was given and has no effect."""
    reasons = without_effect(config, on_cpu, tokenizer)
    given = {name: value for name, value in config.given.items() if name in reasons}
    return [f"warning: {name} {value} has no effect: {reasons[name]}" for name, value in given.items()]
