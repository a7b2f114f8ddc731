"""Which settings have no effect beside the others, and why: said at a run's start and by dry runs."""

from newllm.data.order import batch_count
from newllm.models.baselines import BASELINES

PHASE1 = "phase1_shuffle phase1_learning_rate phase1_batch_size dist_reg dist_reg_weight context_noise"
CONTEXT = f"{PHASE1} phase1_max_iterations phase1_convergence_threshold phase1_min_converged_ratio init_scale"
TUNING = "context_lr_scale gradient_sweeps"
QUICK = "val_quick_every_n_batches val_quick_frac"
PHASE2 = "phase2_epochs phase2_learning_rate phase2_batch_size warmup_ratio patience weight_decay dropout"
SAVING = "save_every_n_batches save_min_seconds save_every_minutes keep_last backup_dir backup_every_minutes"


def training_samples(config):
    """Samples that training passes over: those that `tune_share` takes for validation are not among them."""
    taken = max(1, round(config.tune_share * config.num_samples)) if config.tune_share else 0
    return max(1, config.num_samples - taken)


def without_effect(config, on_cpu, tokenizer):
    """{setting: why it has no effect beside the others}, whether given or not; the first reason counts.

    Args:
        on_cpu: whether the run computes there. tokenizer: name of the one in effect; "bpe" is trained here.
    """
    c, kind, samples = config, config.model_type, training_samples(config)
    context, fixed, attends = kind == "context", kind in ("window", "token"), kind == "transformer"
    only1, no_phase1, no_layers = c.phase == "1", not c.phase1_max_iterations, not c.token_layers
    fewest = min(c.min_batches, samples)
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
