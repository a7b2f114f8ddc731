"""What a run says of itself: the banner, its closing block, and its record as text. Plain numbers only."""

import math
from statistics import fmean

from newllm.report.record import STAGES, format_value, shown

TITLES = {"untrained": "untrained control", "phase1": "Phase 1", "phase2": "Phase 2"}
COUNTED = {"kn": "Kneser-Ney of order 5", "bigram": "bigram", "unigram": "unigram"}
CONTEXTS = {  # of contexts: what it is, and its format
    "er_train": ("effective rank, training tokens", ".1%"),
    "er_val": ("effective rank, validation tokens", ".1%"),
    "er_ceiling": ("ceiling of effective rank at so many tokens", ".1%"),
    "converged_ratio": ("tokens converged after 10 cold sweeps", ".1%"),
    "cold_start_error_10": ("cold-start error after 10 sweeps", ".3g"),
    "contraction": ("change of the error a sweep, times", ".3g"),
    "lyapunov_exponent": ("Lyapunov exponent, nats a token (sweeps converge below zero)", "+.3f"),
    "sweeps_to_1_percent": ("cold sweeps until the error is below 1 %", "d"),
    "memory_horizon": ("memory horizon, tokens", ".3g"),
    "past_capacity": ("past capacity", ".3g"),
}
CONTEXT_KEYS = "sweeps_to_convergence", *(key for key in CONTEXTS if key != "er_ceiling")
EXPERTS = {  # of a mixture, in turn: what they are, in words
    "network": "the network alone",
    "ngram": "+ counts of the training text (n-grams)",
    "cache": "+ what followed places like this in the dialogue so far (cache)",
    "knn": "+ what followed places like this in the training text (nearest neighbours)",
}
RETRIEVAL_CONTROLS = {  # and how the names of their figures end
    "all of these, with weights that are the same at every place": "fixed",
    "all of these without the network: counting and copying alone": "counting",
    "all of these with a head on untrained contexts as the network": "untrained",
    "no network, places compared by Phase 1's contexts alone": "phase1_contexts",
    "no network, places compared by untrained contexts alone": "untrained_contexts",
}
CURVES = ("cold_start_curve", "memory_curve", "past_capacity_by_lag", "spectrum")
SECTIONS = {  # of the summary as text: names of settings, of the record's first row, and of figures
    "MODEL CONFIGURATION": (
        "model_type", "vocab_size", "num_layers", "context_dim", "embed_dim", "parameters",
    ),
    "TRAINING CONFIGURATION": (
        "data_source", "tokenizer", "train_tokens", "phase2_epochs", "batches", "trainable", "seed", "device",
        "phase1_learning_rate", "phase2_learning_rate", "attention", "versions", "git_commit",
    ),
}  # fmt: skip


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
        f"retrieval: {looked_up(config)}",
        f"Using checkpoint directory: {config.checkpoint_dir}",
    ]
    changed = [f"{name} = {new!r} (file: {old!r})" for name, (old, new) in config.differences().items()]
    if changed:
        lines.append(f"differs from config.py: {', '.join(changed)}")
    return [*lines, *notes]


def looked_up(config):
    """What is looked up after Phase 2, and by which keys."""
    if not config.looks_up or config.phase != "both":
        return "nothing is looked up"
    said = f"{', '.join(config.looks_up)}, at most {config.retrieval_window:,} tokens back"
    if {"cache", "knn"} & {*config.looks_up}:
        said += f", places compared by {' and '.join(config.keys)}"
    return said


def trainable(plan):
    """How many parameters train in each phase."""
    phases = {stage: part for stage, part in plan.items() if stage != "untrained"}
    return ", ".join(f"{part['trainable']:,} in {TITLES[stage]}" for stage, part in phases.items())


def batches(plan):
    """The batches in effect in each phase, and why they are not those asked for."""
    lines = []
    for stage, part in plan.items():
        if stage != "untrained":
            smaller = f"; {part['asked']} asked for, min_batches makes them smaller"
            why = smaller if part["samples"] < part["asked"] else ""
            lines.append(f"{part['samples']} samples in {TITLES[stage]} ({part['batches']} a pass{why})")
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
    figures = (f"{what}: {shown(contexts.get(key), form, 'none')}" for key, (what, form) in CONTEXTS.items())
    return f"{name:>9} contexts | {', '.join(figures)}"


def retrieval_line(figures):
    """One line about the mixture: its figures, and how much it trusts each of its parts."""
    weights = ", ".join(f"{name} {weight:.0%}" for name, weight in figures["weights"].items())
    return f"retrieval | val ppl {figures['ppl']:.1f} bpb {figures['bpb']:.3f} | trusts {weights}"


def summarize(config, data, results):
    """The `key: value` block of a run, from its metrics by stage; stages that have not run give no keys."""
    untrained, phase1 = results["untrained"], results.get("phase1")
    contexts = "fine-tuned" if config.model_type == "context" else "none"
    if config.freeze_context or config.model_type in ("window", "token"):
        contexts = "frozen"
    summary = {
        "data_source": data.source,
        "tokenizer": data.tokenizer.name,
        "vocab_size": data.vocab_size,
        "train_tokens": config.train_tokens,
        "model_type": config.model_type,
        "contexts": contexts,
    }
    if phase1:
        summary |= phase1["training"]
        for key in CONTEXT_KEYS:
            summary[key] = phase1["contexts"].get(key)
            summary[f"{key}_untrained"] = untrained["contexts"].get(key)
        summary |= {key: phase1["contexts"][key] for key in ("er_ceiling", "rank_tokens")}
    if "phase2" in results:
        head, contexts = results["phase2"]["head"], results["phase2"].get("contexts", {})
        summary |= {f"{key}_finetuned": value for key, value in contexts.items() if key in CONTEXT_KEYS}
        summary |= {f"val_{key}": head[key] for key in ("loss", "ppl", "bpb", "acc")}
        summary |= {f"phase2_{key}": head[key] for key in ("steps", "first_loss", "uniform_loss")}
        summary["phase2_best_epoch"] = head["epoch"]
        summary |= {f"{key}_phase2": head[key] for key in ("tok_per_s", "seconds")}
        summary["seconds_training"] = head["seconds"] + summary.get("seconds_phase1", 0.0)
    if "head" in untrained:
        summary |= {f"val_{key}_untrained_context": untrained["head"][key] for key in ("ppl", "bpb")}
    summary |= retrieval_figures(results)
    if "samples" in (last := results.get("retrieval", {})):
        summary["samples"] = last["samples"]
    return summary | {f"val_ppl_{name}": math.exp(nats) for name, nats in untrained["ngrams"].items()}


def retrieval_figures(results):
    """Those figures of the block that are of retrieval, from metrics by stage; {} without any."""
    untrained, own = results["untrained"], results.get("retrieval", {})
    summary = {}
    for name, figures in (
        ("", own),
        ("_counting", untrained.get("counting")),
        ("_untrained", untrained.get("retrieval")),
        ("_phase1_contexts", results.get("phase1", {}).get("by_contexts")),
        ("_untrained_contexts", untrained.get("by_contexts")),
    ):
        if "ppl" in (figures or ()):
            summary |= {f"val_{key}_retrieval{name}": figures[key] for key in ("ppl", "bpb")}
    if "ppl" in own:
        summary["val_ppl_retrieval_fixed"] = own["fixed"]["ppl"]
        for count, part in enumerate(own["in_turn"].values(), start=1):
            if count > 1:  # one alone is the network
                summary[f"val_ppl_{'_'.join(list(own['weights'])[:count])}"] = part["ppl"]
        for kind, found in (("weight", own), ("fixed_weight", own["fixed"])):
            summary |= {f"retrieval_{kind}_{name}": weight for name, weight in found["weights"].items()}
    return summary


def language_rows(summary, looks_up=True):
    """(what it is, perplexity, bits per byte) on held-out dialogues, of a model and of those beside it.

    looks_up: False of a model without what it looked up: its rows are left out.
    """
    with_all = looks_up and "val_ppl_retrieval" in summary
    rows = []
    for key, name in (
        ("val_{}_retrieval", "this model"),
        ("val_{}", "its network alone" if with_all else "this model"),
        ("val_{}_retrieval_counting", "the same retrieval without a network: counting and copying"),
        ("val_{}_retrieval_untrained", "the same retrieval on untrained contexts"),
        ("val_{}_untrained_context", "the same head on untrained contexts, alone"),
    ):
        figures = [summary.get(key.format(unit)) for unit in ("ppl", "bpb")]
        if figures[0] is not None and (looks_up or "retrieval" not in key):
            rows.append((name, *figures))
    bits_a_nat = summary["val_bpb"] / summary["val_loss"]
    for key, name in COUNTED.items():
        ppl = summary[f"val_ppl_{key}"]
        rows.append((f"{name}, counting", ppl, bits_a_nat * math.log(ppl)))
    return rows


def parts_of(known):
    """What retrieval consists of: {what it is: (key of its perplexity, of its weight or None)}.

    The parts are added in turn, each mixture fitted by itself; the controls follow. known: function of a key
    that says whether there is such a figure.
    """
    names = [name for name in EXPERTS if known(f"retrieval_weight_{name}")]
    if not names:
        return {}
    between = ["val_ppl_" + "_".join(names[:count]) for count in range(2, len(names))]
    keys = zip(("val_ppl", *between, "val_ppl_retrieval"), names, strict=True)
    parts = {EXPERTS[name]: (key, f"retrieval_weight_{name}") for key, name in keys}
    return parts | {what: (f"val_ppl_retrieval_{end}", None) for what, end in RETRIEVAL_CONTROLS.items()}


def retrieval_rows(summary):
    """What each part of a mixture is worth: texts (what it is, perplexity, against the network, weight).

    The weight is the gate's mean in the whole mixture.
    """
    rows = []
    for what, (key, weight) in parts_of(summary.__contains__).items():
        if key in summary:
            change = f"{summary[key] / summary['val_ppl'] - 1:+.1%}" if rows else ""
            rows.append((what, f"{summary[key]:.1f}", change, shown(summary.get(weight), ".0%")))
    return rows


def network_share(summary):
    """How far the network brings the mixture below the same retrieval without one, in a sentence."""
    with_all, without = summary["val_ppl_retrieval"], summary["val_ppl_retrieval_counting"]
    side = "below" if with_all <= without else "above"
    return (
        f"Counting and copying reach {without:.1f} without any network; with it {with_all:.1f}, "
        f"{abs(with_all / without - 1):.1%} {side} that: this is the network's own part."
    )


def curves(results):
    """From metrics by stage, what pictures and comparisons need: curves of contexts, nats of each sample.

    The latter also with retrieval, and with that of counting.
    """
    last = results.get("phase2", {})
    contexts = last.get("contexts") or results.get("phase1", {}).get("contexts") or {}
    untrained = results["untrained"].get("contexts", {})
    found = {
        "val_sample_nats": last.get("head", {}).get("sample_nats"),
        "bpb_by_context": last.get("bpb_by_context"),
        **{name: contexts.get(name) for name in CURVES},
        **{f"{name}_untrained": untrained.get(name) for name in CURVES},
    }
    if "in_turn" in (own := results.get("retrieval", {})):
        parts = own["in_turn"] | {list(own["weights"])[-1]: own, "counting": results["untrained"]["counting"]}
        for name, part in (("retrieval", own), ("counting", parts["counting"])):
            found[f"val_sample_nats_{name}"] = part["sample_nats"]
        found["retrieval_by_position"] = {name: part["by_position"] for name, part in parts.items()}
    return found


def end_of(summary):
    """What the names of the figures of the contexts that a run ended with end in."""
    return "_finetuned" if "er_val_finetuned" in summary else ""


def plain(summary):
    """The figures of a summary that are single values, without its curves and samples."""
    return {key: value for key, value in summary.items() if not isinstance(value, list | dict)}


def summary_lines(record, files):
    """A complete run as text: model, training, results, and which of the files {name: path} exist."""
    plan, summary = record.start["plan"], record.summary
    facts = record.config | record.start | summary
    facts |= {"batches": batches(plan), "trainable": trainable(plan)}
    lines = [f"TRAINING SUMMARY of run {record.run}, begun {record.start['time']}"]
    for title, names in SECTIONS.items():
        lines += ["", title, *(f"  {name}: {format_value(facts[name])}" for name in names)]
    lines += ["", "RESULTS"]
    if "val_ppl_retrieval" in summary:
        lines.append(f"  {network_share(summary)}")
    for side in ("train_loss", "val_loss"):
        if losses := record.phase2.get(side):
            lines += [f"  final {side}: {losses[-1]:.4f}", f"  best {side}: {min(losses):.4f}"]
    lines += [f"  {name}: {format_value(value)}" for name, value in plain(summary).items() if name != "time"]
    for sample in summary.get("samples", []):
        lines += ["", "SAMPLE, begun with the words of a held-out dialogue"]
        lines += [f"  {name}: {text!r}" for name, text in sample.items() if text is not None]
    return [*lines, "", "ARTEFACTS", *(f"  {name}: {path}" for name, path in files.items() if path.exists())]


def speed_lines(record, status, baseline=None):
    """How far a run is or came, how fast, and where the time went or how much is left.

    status: of its folder, {} where it is another run's. baseline: a complete run to compare with.
    """
    plan, tokens, seconds = record.start["plan"], 0, 0.0
    lines = [f"SPEED ANALYSIS of run {record.run} ({status.get('state', 'not running')}), {record.kind}"]
    for stage, planned in plan.items():
        rows, counter = getattr(record, stage), STAGES[stage]
        count = len(rows.get(counter, []))
        done = count * planned["tokens"] // planned["passes"]
        speed = rows["tok_per_s"][-1] if rows else status.get("tok_per_s", 0.0)
        if status.get("stage") == stage:
            done = max(done, status.get("tokens_done", 0))
        if not done:
            lines.append(f"  {TITLES[stage]}: not begun")
            continue
        tokens += done
        seconds += done / speed
        line = f"  {TITLES[stage]}: {count} of at most {planned['passes']} {counter}s, {done:,} tokens, "
        line += f"{done / speed:.1f} s, {speed:,.0f} tok/s"
        if theirs := baseline and baseline.summary.get(f"tok_per_s_{stage}"):
            line += f", {speed / theirs:.2f} times the speed of run {baseline.run}"
        lines.append(line)
    whole = sum(planned["tokens"] for planned in plan.values())
    share = tokens / max(whole, 1)  # Phase 1 alone is nothing to a baseline
    lines.append(f"  progress: {tokens:,} of at most {whole:,} tokens of all phases ({share:.1%})")
    if record.times:
        return lines + _time_lines(record)
    lines.append(f"  done: {seconds:.1f} s of training")
    if status.get("eta_s") is not None:
        total = seconds + status["eta_s"]
        lines.append(f"  remaining: {status['eta_s']:.1f} s, at most and by the speed measured so far")
        lines.append(f"  total: {total:.1f} s, without loading and measuring contexts")
    return lines


def _time_lines(record):
    """The parts that the wall time of a run over all sessions is the sum of."""
    summary, times = record.summary, record.times
    parts, total = times["parts"], times["seconds"]
    loads = record.phase1.get("gpu_utilization", []) + record.phase2.get("gpu_utilization", [])
    loads = [load for load in loads if load is not None]
    longest_first = sorted(parts, key=parts.get, reverse=True)
    mean = times["save_seconds"] / max(1, times["saves"])
    return [
        f"  GPU utilisation: {f'{fmean(loads):.0f}%' if loads else 'not available on this device'}",
        f"  waiting for data: {parts.get('fetching rows', 0.0) / total:.2%} of the time",
        f"  waiting for saves: {summary['saving_share']:.2%} of the last session",
        f"  {times['saves']} saves by a thread: mean {mean:.2f} s, longest {times['longest_save']:.2f} s",
        "",
        "WHERE THE TIME WENT",
        *(f"  {part}: {parts[part]:.1f} s ({parts[part] / total:.1%})" for part in longest_first),
        f"  total: {total:.1f} s in {record.sessions} session(s)",
    ]
