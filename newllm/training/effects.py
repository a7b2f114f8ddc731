"""Which settings have no effect beside the others, and why: the one table of it. Said at the start of a run, by doctor and dry runs."""

from newllm.data.order import batch_count
from newllm.models.baselines import BASELINES

PHASE1 = "phase1_shuffle phase1_learning_rate phase1_batch_size dist_reg dist_reg_weight context_noise"
PHASE1_AND_FIGURES = f"{PHASE1} phase1_max_iterations phase1_convergence_threshold phase1_min_converged_ratio"
HEAD = (
    "phase2_epochs phase2_learning_rate phase2_batch_size warmup_ratio patience weight_decay dropout whiten_context "
    "val_quick_frac val_quick_every_n_batches"
)
FINE_TUNING = "context_lr_scale gradient_sweeps"
SAVING = "save_every_n_batches save_min_seconds save_every_minutes keep_last backup_dir backup_every_minutes"


def training_samples(config):
    """Samples that training passes over: those that `tune_share` takes for validation are not among them."""
    taken = max(1, round(config.tune_share * config.num_samples)) if config.tune_share else 0
    return max(1, config.num_samples - taken)


def batches_in_effect(config):
    """(samples of the largest batch of Phase 1, of Phase 2), after min_batches."""
    samples, sizes = training_samples(config), (config.phase1_batch_size, config.phase2_batch_size)
    return tuple(-(-samples // batch_count(samples, size, config.min_batches)) for size in sizes)


def without_effect(config, on_cpu, tokenizer):
    """Setting -> why it has no effect beside the others, whether anybody gave it or not.

    Args:
        on_cpu: whether the run computes on a CPU. tokenizer: name of the one in effect; "bpe" is trained here.
    """
    kind, found = config.model_type, {}

    def rule(names, applies, why):
        for name in names.split() if applies else ():
            found.setdefault(name, why)

    context, control = kind == "context", kind == "context" and config.untrained_control
    baseline, fixed = kind in BASELINES, kind in ("window", "token")
    unlearned = f"{PHASE1_AND_FIGURES} {FINE_TUNING} init_scale untrained_control"
    rule(unlearned, not context, f"model_type '{kind}' has no context to learn")
    rule("freeze_context token_dropout compile", fixed, f"model_type '{kind}' has no context map that trains")
    rule("context_memory_mb", baseline, f"model_type '{kind}' keeps no contexts of the samples")
    rule("num_layers", fixed, f"model_type '{kind}' has no layers below the head")
    transformer = kind == "transformer"
    rule(
        "context_dim token_layers",
        transformer,
        "a transformer has the width embed_dim, and no layers of the head",
    )
    rule("context_dim", fixed and not config.token_layers, "the head reads no context (token_layers 0)")
    rule("dropout", not baseline and not config.token_layers, "the head has no layers (token_layers 0)")
    rule("attention", not transformer, f"model_type '{kind}' has no attention")
    rule("adapter_rank", config.context_adapter == "none", "there is no adapter (context_adapter)")

    rule(PHASE1, not config.phase1_max_iterations, "there is no Phase 1 (phase1_max_iterations 0)")
    rule("dist_reg", not config.dist_reg_weight, "the regularizer counts nothing (dist_reg_weight 0)")
    later = "it belongs to Phase 2, which phase 1 leaves for a later run"
    rule(
        f"{FINE_TUNING} token_dropout freeze_context context_adapter adapter_rank", config.phase == "1", later
    )
    rule(HEAD, config.phase == "1" and not control, later)
    rule(f"{FINE_TUNING} token_dropout", config.freeze_context, "contexts are frozen (freeze_context)")
    frozen = config.freeze_context and not config.phase1_max_iterations
    rule("compile", frozen, "nothing trains the context map (freeze_context, phase1_max_iterations 0)")
    _batches(config, rule)
    rule("patience", config.phase2_epochs <= 2, f"{config.phase2_epochs} epochs leave none to stop before")

    num_tokens = config.given.get("num_tokens", getattr(type(config), "num_tokens", 0))
    rule("num_samples", "num_samples" in config.given and num_tokens, "num_tokens says how many")
    rule("vocab_size", tokenizer != "bpe", f"the vocabulary is that of the tokenizer {tokenizer}")
    rule("val_samples", config.tune_share, "validation takes training samples (tune_share)")
    rule("gpu_memory_fraction", on_cpu, "the run computes on the CPU")
    rule(SAVING, not config.save_checkpoint, "nothing is saved (save_checkpoint is off)")
    rule("backup_every_minutes", not config.backup_dir, "there are no second copies (backup_dir)")
    return found


def _batches(config, rule):
    """What follows from the number of batches of an epoch."""
    samples, fewest = training_samples(config), min(config.min_batches, training_samples(config))
    one, two = config.phase1_batch_size, config.phase2_batch_size
    for name, size, now in zip(
        ("phase1_batch_size", "phase2_batch_size"), (one, two), batches_in_effect(config), strict=True
    ):
        why = f"min_batches {config.min_batches} makes batches of {now} of {samples} samples"
        rule(name, samples // size < fewest, why)
    batches, every = batch_count(samples, two, config.min_batches), config.val_quick_every_n_batches
    rule("val_quick_frac", not every, "there are no quick checks (val_quick_every_n_batches 0)")
    rule("val_quick_frac val_quick_every_n_batches", batches == 1, "an epoch is one batch")


def unused_lines(config, on_cpu, tokenizer):
    """A line for each setting that was given and has no effect."""
    found, given = without_effect(config, on_cpu, tokenizer), config.given
    return [
        f"warning: {name} {given[name]} has no effect: {why}" for name, why in found.items() if name in given
    ]
