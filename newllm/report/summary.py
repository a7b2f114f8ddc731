"""What a run says of itself: the banner, its closing block, and its record as text. Plain numbers only."""

import math
from statistics import fmean

from newllm.report.record import STAGES, format_value, remaining

TITLES = {"untrained": "untrained control", "phase1": "Phase 1", "phase2": "Phase 2"}
CONTEXT_KEYS = (
    "er_train", "er_val", "converged_ratio", "sweeps_to_convergence", "cold_start_error_10", "contraction",
    "memory_horizon", "past_capacity", "identity_r2",
)  # fmt: skip
COUNTED = {
    "kn": "Kneser-Ney of order 5, counting",
    "bigram": "bigram, counting",
    "unigram": "unigram, counting",
}
CURVES = ("cold_start_curve", "memory_curve", "past_capacity_by_lag", "spectrum")


def banner(config, device_line, data, model, plan, notes):
    """Lines before a run starts: what is in effect, by newllm.training.plan, not what was asked for."""
    total = sum(p.numel() for p in model.parameters())
    context = sum(p.numel() for p in model.context_parameters())
    lines = [
        f"device: {device_line}",
        *data.notes,
        f"budget: {config.num_samples:,} samples x {config.max_seq_length} = {config.train_tokens:,} "
        f"training tokens, {len(data.val):,} validation samples from other dialogues",
        f"model: {total:,} parameters ({context:,} in the context map): {config.num_layers} layers, context "
        f"{config.context_dim}, embedding {config.embed_dim}, vocabulary {data.vocab_size:,}",
        f"trainable parameters: {trainable(plan)}",
        f"batches: {batches(plan)}; {cadence(config)}",
        f"Using checkpoint directory: {config.checkpoint_dir}",
    ]
    changed = [f"{name} = {new!r} (file: {old!r})" for name, (old, new) in config.differences().items()]
    if changed:
        lines.append(f"differs from config.py: {', '.join(changed)}")
    return [*lines, *notes]


def trainable(plan):
    """How many parameters train in each phase."""
    phases = [stage for stage in plan if stage != "untrained"]
    return ", ".join(f"{plan[stage]['trainable']:,} in {TITLES[stage]}" for stage in phases)


def batches(plan):
    """The batches in effect in each phase, and why they are not those asked for."""
    lines = []
    for stage in plan:
        if stage == "untrained":
            continue
        samples, asked = plan[stage]["samples"], plan[stage]["asked"]
        why = f"; {asked} asked for, min_batches makes them smaller" if samples < asked else ""
        lines.append(f"{samples} samples in {TITLES[stage]} ({plan[stage]['batches']} a pass{why})")
    return ", ".join(lines)


def cadence(config):
    """How often the state is saved."""
    if not config.save_checkpoint:
        return "no checkpoints"
    minutes = f", or {config.save_every_minutes:g} minutes" if config.save_every_minutes else ""
    apart = f", {config.save_min_seconds:g} s apart at least" if config.save_min_seconds else ""
    return f"checkpoint every {config.save_every_n_batches} batches{apart}{minutes}"


def context_line(name, contexts):
    """One line about contexts: rank, convergence and memory always together."""
    return (
        f"{name:>9} contexts | ER train {contexts['er_train']:.1%} val {contexts['er_val']:.1%} "
        f"(ceiling {contexts['er_ceiling']:.1%} at {contexts['rank_tokens']:,} tokens) | cold-start error "
        f"after 10 sweeps {contexts['cold_start_error_10']:.2g}, x{contexts['contraction']:.2f} a sweep | "
        f"memory horizon {contexts['memory_horizon']} tokens, past capacity {contexts['past_capacity']:.2f}"
    )


def summarize(config, data, results):
    """The `key: value` block of a run, from its metrics by stage; stages that have not run give no keys."""
    untrained, phase1 = results["untrained"], results.get("phase1")
    summary = {
        "data_source": data.source,
        "tokenizer": data.tokenizer.name,
        "vocab_size": data.vocab_size,
        "train_tokens": config.train_tokens,
        "model_type": config.model_type,
        "contexts": _contexts(config),
    }
    if phase1:
        summary |= phase1["training"]
        for key in CONTEXT_KEYS:
            summary[key] = phase1["contexts"][key]
            summary[f"{key}_untrained"] = untrained["contexts"][key]
        summary |= {key: phase1["contexts"][key] for key in ("er_ceiling", "rank_tokens")}
    if "phase2" in results:
        head, contexts = results["phase2"]["head"], results["phase2"].get("contexts", {})
        summary |= {f"{key}_finetuned": value for key, value in contexts.items() if key in CONTEXT_KEYS}
        summary |= {f"val_{key}": head[key] for key in ("loss", "ppl", "bpb", "acc")}
        summary |= {f"phase2_{key}": head[key] for key in ("steps", "first_loss", "uniform_loss")}
        summary |= {
            "phase2_best_epoch": head["epoch"],
            "tok_per_s_phase2": head["tok_per_s"],
            "seconds_phase2": head["seconds"],
            "seconds_training": head["seconds"] + summary.get("seconds_phase1", 0.0),
        }
    if "head" in untrained:
        summary |= {f"val_{key}_untrained_context": untrained["head"][key] for key in ("ppl", "bpb")}
    return summary | {f"val_ppl_{name}": math.exp(nats) for name, nats in untrained["ngrams"].items()}


def _contexts(config):
    """What Phase 2 does with the contexts, in a word or two."""
    if config.model_type in ("window", "token") or config.freeze_context:
        return "frozen"
    return "fine-tuned" if config.model_type == "context" else "none"


def language_rows(summary):
    """(what it is, perplexity, bits per byte) on held-out dialogues, of a model and of those beside it."""
    rows = [("this model", summary["val_ppl"], summary["val_bpb"])]
    if "val_ppl_untrained_context" in summary:
        name = "the same head on untrained contexts"
        rows.append((name, summary["val_ppl_untrained_context"], summary["val_bpb_untrained_context"]))
    bits_a_nat = summary["val_bpb"] / summary["val_loss"]
    for key, name in COUNTED.items():
        ppl = summary[f"val_ppl_{key}"]
        rows.append((name, ppl, bits_a_nat * math.log(ppl)))
    return rows


def curves(results):
    """From metrics by stage, what pictures and comparisons need: curves of contexts, nats of each sample."""
    last = results.get("phase2", {})
    contexts = last.get("contexts") or results.get("phase1", {}).get("contexts") or {}
    untrained = results["untrained"].get("contexts", {})
    return {
        "val_sample_nats": last.get("head", {}).get("sample_nats"),
        "bpb_by_context": last.get("bpb_by_context"),
        **{name: contexts.get(name) for name in CURVES},
        **{f"{name}_untrained": untrained.get(name) for name in CURVES},
    }


def plain(summary):
    """The figures of a summary that are single values, without its curves."""
    return {key: value for key, value in summary.items() if not isinstance(value, list | dict)}


def summary_lines(record, files):
    """A complete run as text: model, training, results, and which of the files {name: path} exist."""
    config, start, summary = record.config, record.start, record.summary
    losses = {}
    for side, name in (("training", "train_loss"), ("validation", "val_loss")):
        if values := record.phase2.get(name):
            losses |= {f"final {side} loss": f"{values[-1]:.4f}", f"best {side} loss": f"{min(values):.4f}"}
    seconds = summary.get("seconds_training", summary.get("seconds_phase1", 0.0))
    versions = [f"{name} {version}" for name, version in start.get("versions", {}).items()]
    rates = [f"{config[f'{phase}_learning_rate']:g} in {TITLES[phase]}" for phase in ("phase1", "phase2")]
    sections = {
        "MODEL CONFIGURATION": {
            "model type": record.kind,
            "vocabulary size": summary["vocab_size"],
            "layers": config["num_layers"],
            "context width": config["context_dim"],
            "embedding width": config["embed_dim"],
            "parameters": f"{summary['parameters']:,}",
        },
        "TRAINING CONFIGURATION": {
            "data": f"{summary['data_source']}, tokenizer {summary['tokenizer']}",
            "training tokens": f"{summary['train_tokens']:,}",
            "epochs": config["phase2_epochs"],
            "batch size": batches(start["plan"]),
            "trainable parameters": trainable(start["plan"]),
            "learning rate": ", ".join(rates),
            "seed": config["seed"],
            "device": start["device"],
            "attention": start["attention"],
            "versions": ", ".join(versions),
            "commit": start.get("git_commit"),
        },
        "RESULTS": {
            **losses,
            "training time": f"{seconds:.1f} s of {summary['seconds']:.1f} s, {record.sessions} session(s)",
            **{key: format_value(value) for key, value in summary.items() if key != "time"},
        },
        "ARTEFACTS": {name: path for name, path in files.items() if path.exists()},
    }
    lines = [f"TRAINING SUMMARY of run {record.run}, begun {start['time']}"]
    for title, values in sections.items():
        lines += ["", title, *(f"  {name}: {value}" for name, value in values.items())]
    return lines


def speed_lines(record):
    """How fast the phases of a run were, and the parts that its wall time over all sessions is the sum of."""
    summary, times = record.summary, record.times
    lines = ["SPEED ANALYSIS"]
    for stage in ("phase1", "phase2"):
        count = len(getattr(record, stage).get(STAGES[stage], []))
        if count and f"seconds_{stage}" in summary:  # Phase 2 may have been begun and then left out
            done = f"{count} {STAGES[stage]}s, {count * summary['train_tokens']:,} tokens"
            speed = f"{summary[f'seconds_{stage}']:.1f} s, {summary[f'tok_per_s_{stage}']:,.0f} tok/s"
            lines.append(f"  {TITLES[stage]}: {done}, {speed}")
    if "seconds_phase2" in summary and record.phase2:
        validation = sum(record.phase2["seconds_validation"])
        share = validation / summary["seconds_phase2"]
        lines.append(f"  of Phase 2, validation: {validation:.1f} s ({share:.1%})")
    saving = f"training waited {summary['saving_share']:.2%} of the time"
    saving += f", a thread worked {summary['saving_share_background']:.2%}"
    lines += [f"  saving, in the last session: {saving}", "", "WHERE THE TIME WENT"]
    total = max(times.get("seconds", summary["seconds"]), 1e-9)
    parts = times.get("parts", {"not told apart": total})
    for part in sorted(parts, key=parts.get, reverse=True):
        lines.append(f"  {part}: {parts[part]:.1f} s ({parts[part] / total:.1%})")
    lines.append(f"  total: {total:.1f} s in {record.sessions} session(s)")
    if times.get("saves"):
        took = f"mean {times['save_seconds'] / times['saves']:.2f} s, longest {times['longest_save']:.2f} s"
        lines.append(f"  {times['saves']} saves by a thread beside the training: {took}")
    if times:
        lines.append(f"  waiting for data: {parts.get('fetching rows', 0.0) / total:.2%} of the time")
    looks = record.phase1.get("gpu_utilization", []) + record.phase2.get("gpu_utilization", [])
    loads = [load for load in looks if load is not None]
    load = f"{fmean(loads):.0f}% in the mean of the epochs" if loads else "not available on this device"
    return [*lines, f"  GPU utilisation: {load}"]


def so_far_lines(record, status, baseline=None):
    """What a run that is not complete has done, how fast, and what is left.

    Args:
        status: of its folder, {} where it is another run's. baseline: a complete run to compare with.
    """
    plan, state = record.start.get("plan", {}), status.get("state", "not complete")
    about = ", ".join([record.kind, *record.start["data"][:1]])
    lines = [f"RUN {record.run} ({state}), begun {record.start['time']}: {about}"]
    tokens, spent, left = 0, 0.0, {}
    for stage, planned in plan.items():
        rows, counter = getattr(record, stage), STAGES[stage]
        current = status.get("stage") == stage
        if not rows and not current:
            estimate = f", about {left[stage]:.0f} s (estimate)" if stage in left else ""
            lines.append(f"  {TITLES[stage]}: not begun{estimate}")
            continue
        count = len(rows.get(counter, []))
        done = count * planned["tokens"] // planned["passes"]
        speed = rows["tok_per_s"][-1] if rows else 0.0
        if current:
            done = max(done, status.get("tokens_done", 0))
            speed = speed or status.get("tok_per_s", 0.0)
        seconds = done / speed if speed else 0.0
        left = remaining(plan, stage, done, speed)
        tokens += done
        spent += seconds
        line = f"  {TITLES[stage]}: {count} of at most {planned['passes']} {counter}s, {done:,} tokens, "
        line += f"{seconds:.1f} s, {speed:,.0f} tok/s"
        if losses := [loss for loss in rows.get("val_loss", []) if loss is not None]:
            line += f", best val loss {min(losses):.4f}"
        theirs = baseline and baseline.summary.get(f"tok_per_s_{stage}")
        if theirs and speed:
            line += f", {speed / theirs:.2f} times the speed of run {baseline.run}"
        lines.append(line)
    whole, rest = sum(planned["tokens"] for planned in plan.values()), sum(left.values())
    share = tokens / max(whole, 1)
    lines.append(f"  progress: {tokens:,} of at most {whole:,} tokens of all phases ({share:.1%})")
    if not left:
        return [*lines, "  speed, remaining and total: not known yet"]
    return [
        *lines,
        f"  done: {spent:.1f} s of training",
        f"  remaining: {rest:.1f} s, at most and estimated from the speed measured so far",
        f"  total: {spent + rest:.1f} s, without loading and measuring contexts",
    ]
