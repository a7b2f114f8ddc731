"""From the results of the stages to the closing block, each figure beside its untrained value. Plain numbers only."""

import math


def context_line(name, contexts):
    """One line about contexts: rank, convergence and memory always together."""
    return (
        f"{name:>9} contexts | ER train {contexts['er_train']:.1%} val {contexts['er_val']:.1%} (ceiling "
        f"{contexts['er_ceiling']:.1%} at {contexts['rank_tokens']:,} tokens) | cold-start error after 10 sweeps "
        f"{contexts['cold_start_error_10']:.2g}, x{contexts['contraction']:.2f} a sweep | memory horizon "
        f"{contexts['memory_horizon']} tokens, past capacity {contexts['past_capacity']:.2f}"
    )


CONTEXT_KEYS = (
    "er_train", "er_val", "converged_ratio", "sweeps_to_convergence", "cold_start_error_10", "contraction",
    "memory_horizon", "past_capacity", "identity_r2",
)  # fmt: skip


def summarize(config, data, results):
    """The `key: value` block of a run; keys of stages that have not run are left out.

    Args:
        results: metrics by stage, as train.py records them.
    """
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
        summary["er_ceiling"] = phase1["contexts"]["er_ceiling"]
        summary["rank_tokens"] = phase1["contexts"]["rank_tokens"]
    for key, value in results.get("phase2", {}).get("contexts", {}).items():
        if key in CONTEXT_KEYS:
            summary[f"{key}_finetuned"] = value
    if "phase2" in results:
        head = results["phase2"]["head"]
        summary |= {f"val_{key}": head[key] for key in ("loss", "ppl", "bpb", "acc")}
        summary |= {
            "phase2_steps": head["steps"],
            "phase2_first_loss": head["first_loss"],
            "phase2_uniform_loss": head["uniform_loss"],
            "phase2_best_epoch": head["epoch"],
            "tok_per_s_phase2": head["tok_per_s"],
            "seconds_phase2": head["seconds"],
            "seconds_training": head["seconds"] + summary.get("seconds_phase1", 0.0),
        }
    if "head" in untrained:
        summary |= {f"val_{key}_untrained_context": untrained["head"][key] for key in ("ppl", "bpb")}
    summary |= {
        **{f"val_ppl_{name}": math.exp(nats) for name, nats in untrained["ngrams"].items()},
    }
    return summary


def _contexts(config):
    """What Phase 2 does with the contexts, in a word or two."""
    if config.model_type in ("window", "token") or config.freeze_context:
        return "frozen"
    return "fine-tuned" if config.model_type == "context" else "none"


COUNTED = {
    "kn": "Kneser-Ney of order 5, counting",
    "bigram": "bigram, counting",
    "unigram": "unigram, counting",
}


def language_rows(summary):
    """(what it is, perplexity, bits per byte) on held-out dialogues: of a model and of what there is beside it."""
    rows = [("this model", summary["val_ppl"], summary["val_bpb"])]
    if "val_ppl_untrained_context" in summary:
        name = "the same head on untrained contexts"
        rows.append((name, summary["val_ppl_untrained_context"], summary["val_bpb_untrained_context"]))
    bits_a_nat = summary["val_bpb"] / summary["val_loss"]
    counted = {name: summary[f"val_ppl_{key}"] for key, name in COUNTED.items()}
    return rows + [(name, ppl, bits_a_nat * math.log(ppl)) for name, ppl in counted.items()]


CURVES = ("cold_start_curve", "memory_curve", "past_capacity_by_lag", "spectrum")


def curves(results):
    """What pictures and paired comparisons need of a run: curves of its final and its untrained contexts, nats of each sample.

    Args:
        results: metrics by stage, as train.py records them.
    """
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
