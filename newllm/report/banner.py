"""What a run says before it starts: device, precision, data, tokenizer, sizes, budget; in effect, not as asked for."""

STAGE_TITLES = {"untrained": "untrained control", "phase1": "Phase 1", "phase2": "Phase 2"}


def banner(config, device_line, data, model, plan, notes):
    """Lines to print. Imports no torch: the model and the data are only asked for their sizes.

    Args:
        plan: of newllm.training.plan. notes: further lines.
    """
    total = sum(p.numel() for p in model.parameters())
    context = sum(p.numel() for p in model.context_parameters())
    lines = [
        f"device: {device_line}",
        *data.notes,
        f"budget: {config.num_samples:,} samples x {config.max_seq_length} = {config.train_tokens:,} training tokens, "
        f"{len(data.val):,} validation samples from other dialogues",
        f"model: {total:,} parameters ({context:,} in the context map): {config.num_layers} "
        f"layers, context {config.context_dim}, embedding {config.embed_dim}, vocabulary {data.vocab_size:,}",
        f"trainable parameters: {trainable(plan)}",
        f"batches: {batches(plan)}; {cadence(config)}",
        f"Using checkpoint directory: {config.checkpoint_dir}",
    ]
    if changed := config.differences():
        lines.append(
            "differs from config.py: "
            + ", ".join(f"{k} = {new!r} (file: {old!r})" for k, (old, new) in changed.items())
        )
    return lines + list(notes)


def trainable(plan):
    """How many parameters train in each phase."""
    return ", ".join(f"{stage['trainable']:,} in {title}" for title, stage in _phases(plan))


def batches(plan):
    """The batches in effect in each phase, and why they are not those asked for."""
    return ", ".join(
        f"{stage['samples']} samples in {title} ({stage['batches']} a pass"
        + (
            f"; {stage['asked']} asked for, min_batches makes them smaller"
            if stage["samples"] < stage["asked"]
            else ""
        )
        + ")"
        for title, stage in _phases(plan)
    )


def cadence(config):
    """How often the state is saved."""
    if not config.save_checkpoint:
        return "no checkpoints"
    minutes = f", or {config.save_every_minutes:g} minutes" if config.save_every_minutes else ""
    apart = f", {config.save_min_seconds:g} s apart at least" if config.save_min_seconds else ""
    return f"checkpoint every {config.save_every_n_batches} batches{apart}{minutes}"


def _phases(plan):
    return [
        (title, plan[stage])
        for stage, title in STAGE_TITLES.items()
        if stage in plan and stage != "untrained"
    ]
