"""Whether a saved run may be continued with the settings and the data of today, and if not, in one sentence why."""

from newllm.config import EARLIER

FORMAT = 3  # of a checkpoint's content
BUDGET = {"num_samples", "num_tokens"}
IDENTITY = {
    "preset", "data_source", "data_split", "data_column", "tokenizer", "vocab_size", "max_seq_length", "val_samples", "context_dim", "embed_dim",
    "num_layers", "token_layers", "tie_weights", "embeddings", "init_scale", "seed", "freeze_context", "model_type",
    "phase1_shuffle", "whiten_context", "tune_share", "context_adapter", "adapter_rank",
}  # fmt: skip
HARMLESS = {
    "cache_dir", "checkpoint_dir", "save_checkpoint", "load_checkpoint", "keep_last", "save_every_n_batches",
    "save_every_minutes", "max_minutes", "backup_dir", "backup_every_minutes", "phase", "device", "precision", "compile",
    "gpu_memory_fraction", "context_memory_mb", "attention", "artifacts", "trackers",
}  # fmt: skip


def compare(found, config, fingerprint):
    """Compare a saved state with what is asked for now.

    Args:
        found: content of a checkpoint. fingerprint: digest of the data that the settings give.

    Returns:
        (verdict, reason): "continue" with None or a warning; "begin" another run beside it; "refuse".
    """
    if found.get("format") != FORMAT:
        return "refuse", f"has format {found.get('format')}, this version reads {FORMAT}: move it away."
    saved = EARLIER | found["config"]
    changed = {
        name: (saved.get(name), value)
        for name, value in config.to_dict().items()
        if saved.get(name) != value and name not in HARMLESS
    }
    if not config.load_checkpoint:
        return "begin", "load_checkpoint is off"
    if refused := {name: change for name, change in changed.items() if name in IDENTITY}:
        return "refuse", (
            f"is of another run ({_differences(refused)}): choose another --checkpoint_dir, restore these settings, or start "
            "afresh with --no-load_checkpoint."
        )
    if budget := {name: change for name, change in changed.items() if name in BUDGET}:
        return "begin", f"another token budget starts its own run ({_differences(budget)})"
    if found["data_fingerprint"] != fingerprint:
        return "refuse", (
            "was trained on other data than the settings give now (the source or its text changed): choose another "
            "--checkpoint_dir, restore the data, or start afresh with --no-load_checkpoint."
        )
    warning = f"warning: settings changed since the checkpoint was written: {_differences(changed)}"
    return "continue", warning if changed else None


def _differences(changed):
    return ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())
