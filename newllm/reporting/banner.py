"""What a run says before it starts: device, precision, data, tokenizer, sizes, budget; in effect, not as asked for."""


def banner(config, device_line, data, model, notes):
    """Lines to print. Imports no torch: the model and the data are only asked for their sizes."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    context = sum(p.numel() for p in model.context_parameters())
    lines = [
        f"device: {device_line}",
        *data.notes,
        f"budget: {config.num_samples:,} samples x {config.max_seq_length} = {config.train_tokens:,} training tokens, "
        f"{len(data.val):,} validation samples from other dialogues",
        f"model: {total:,} parameters ({trainable:,} trainable, {context:,} of them in the context map): {config.num_layers} "
        f"layers, context {config.context_dim}, embedding {config.embed_dim}, vocabulary {data.vocab_size:,}",
        f"batches: {config.phase1_batch_size} samples in Phase 1, {config.phase2_batch_size} in Phase 2; "
        + (f"checkpoint every {config.save_every_n_batches} batches" if config.save_checkpoint else "no checkpoints"),
        f"Using checkpoint directory: {config.checkpoint_dir}",
    ]
    if changed := config.differences():
        lines.append(
            "differs from config.py: "
            + ", ".join(f"{k} = {new!r} (file: {old!r})" for k, (old, new) in changed.items())
        )
    return lines + list(notes)
