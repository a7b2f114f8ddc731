"""Four questions that a newcomer has about a run, answered in plain words from its record."""

from typing import NamedTuple

from newllm.report.record import as_curve
from newllm.report.summary import network_share

QUESTIONS = (
    "Did Phase 1 train?",
    "Did it converge?",
    "How far does it remember?",
    "What is the model good for?",
)
OTHERS = {"gru": "a GRU", "lstm": "an LSTM", "transformer": "a Transformer", "window": "a window of tokens"}
OTHERS |= {"token": "a model of the last token alone"}
CLOSE, NEAR = 0.05, 0.5  # relative distances after ten sweeps: settled, and on the way
AS_GOOD = 1.001  # times the bits per byte that are had with all tokens
PARTS = {"network": "the network", "ngram": "counts", "cache": "the text so far", "knn": "the training text"}
NOT_YET = "Not known: the run was cut off before its end, and the same command continues it."


class Answer(NamedTuple):
    """One of them; each figure is (what it is, its value, what gives it a meaning), as texts."""

    question: str
    words: str
    figures: list


def answers(record):
    """The four Answers about a newllm.report.record.Record, in the order of QUESTIONS."""
    if not record.summary:
        return [Answer(question, NOT_YET, []) for question in QUESTIONS]
    given = _trained(record), _converged(record), _remembers(record), _good_for(record)
    return [Answer(question, *answer) for question, answer in zip(QUESTIONS, given, strict=True)]


def _number(value, form):
    """A figure as text; a record has null for what is no finite number."""
    return "no finite number" if value is None else format(value, form)


def _tokens(number):
    return "1 token" if number == 1 else f"{number:,.0f} tokens"


def _better(value, other):
    """Whether a figure is the smaller one; null counts as infinite."""
    return value is not None and (other is None or value < other)


def _end(summary):
    """What the names of the figures of the contexts that the run ended with end in."""
    return "_finetuned" if "er_val_finetuned" in summary else ""


def _beside(summary, key, form):
    """What a figure of contexts stands beside: after Phase 1, if that was not the last, and untrained."""
    untrained = f"untrained {_number(summary[f'{key}_untrained'], form)}"
    if _end(summary) and summary["phase1_steps"]:
        return f"after Phase 1 {_number(summary[key], form)}, {untrained}"
    return untrained


def _trained(record):
    summary, kind = record.summary, record.config["model_type"]
    if kind in ("window", "token"):
        return f"There is none: nothing that {OTHERS[kind]} keeps of a text is learned. It is a control.", []
    if kind != "context":
        return f"There is none: all of {OTHERS[kind]} trains in Phase 2. It is here to compare with.", []
    if not summary["phase1_steps"]:
        then = "are those of an untrained network" if summary["contexts"] == "frozen" else "learn in Phase 2"
        return f"No, it was left out (phase1_max_iterations is 0): the contexts {then}.", []
    gained = _better(summary["er_val_untrained"], summary["er_val"])
    gained |= _better(summary["cold_start_error_10"], summary["cold_start_error_10_untrained"])
    passes = f"{summary['phase1_iterations']} pass{'es' if summary['phase1_iterations'] > 1 else ''}"
    words = (
        f"{'Yes' if gained else 'Not to any use'}: {summary['phase1_steps']:,} steps in {passes} over the "
        "training text, without labels. A context is the vector that stands for the text so far; the more of "
        "their width contexts use, the more texts they can tell apart."
    )
    if record.config["phase1_shuffle"]:
        words += " As a control it saw the tokens of each sample in random order."
    ceiling = f"untrained {_number(summary['er_val_untrained'], '.1%')}"
    ceiling += f", at most {summary['er_ceiling']:.1%} to be seen in {summary['rank_tokens']:,} tokens"
    used = "share of their width that contexts of held-out text use after it (effective rank)"
    return words, [(used, _number(summary["er_val"], ".1%"), ceiling)]


def _converged(record):
    summary, kind = record.summary, record.config["model_type"]
    if kind in ("gru", "lstm", "window"):
        return f"Not measured: {OTHERS[kind]} reads one token after the other.", []
    if kind == "transformer":
        return "There is nothing to converge: a Transformer reads all tokens at once, in one go.", []
    if kind == "token":
        return "There is nothing to converge: it keeps nothing of a text.", []
    end = _end(summary)
    error, before = (summary[f"cold_start_error_10{name}"] for name in (end, "_untrained"))
    if _better(error, CLOSE):
        words = (
            "Yes: read by sweeps, all tokens at once and that again and again, a text soon gives the "
            "contexts that it has when it is read token by token."
        )
        if _better(before, CLOSE):
            words += " So it does with the untrained network: that is no merit of the training."
    else:
        verdict, come = ("Nearly", "come") if _better(error, NEAR) else ("No", "do not come")
        words = (
            f"{verdict}: ten sweeps, each over all tokens at once, {come} near to the contexts of reading "
        )
        words += "them one by one."
    if end and summary["phase1_steps"]:
        words += " Phase 2 went on to train the contexts, for prediction alone."
    figures = [
        (what, _number(summary[f"{key}{end}"], ".1%"), _beside(summary, key, ".1%"))
        for what, key in (
            ("distance from these contexts after 10 sweeps", "cold_start_error_10"),
            ("tokens whose context hardly changes any more", "converged_ratio"),
        )
    ]
    return words, figures


def _remembers(record):
    summary, config, kind = record.summary, record.config, record.config["model_type"]
    words, figures = "", []
    if kind == "transformer":
        words = f"The last {config['max_seq_length']:,} tokens by construction: it has no more positions."
    elif kind in ("gru", "lstm"):
        words = (
            f"Not measured: {OTHERS[kind]} has read the whole text; what its state keeps is not looked at."
        )
    elif kind == "window":
        words = "The last 8 tokens in order, and fading averages of all, by construction."
    elif kind == "token":
        words = "Not at all, by construction: it sees the last token alone."
    else:
        end = _end(summary)
        horizon, farthest = summary[f"memory_horizon{end}"], max(as_curve(record.curves["memory_curve"]))
        beyond = ", as far as is measured" if horizon == farthest else ""
        words = (
            f"If a token is replaced by another, the context shows it up to {_tokens(horizon)} later{beyond}."
        )
        figures = [
            ("tokens later that a change still shows", str(horizon), _beside(summary, "memory_horizon", "d")),
            (
                "earlier tokens that a straight-line fit reads back from a context (past capacity)",
                _number(summary[f"past_capacity{end}"], ".2f"),
                _beside(summary, "past_capacity", ".2f"),
            ),
        ]
    used = as_curve(record.curves.get("bpb_by_context")) if "val_ppl" in summary and kind != "token" else None
    if used and None not in used.values():
        tokens, whole = [*used.items()][-1]
        enough = min(count for count, bits in used.items() if bits <= AS_GOOD * whole)
        beside = f"{whole:.3f} with all {tokens:.0f}, {used[1.0]:.3f} with the last one alone"
        figures.append((f"bits per byte with the last {_tokens(enough)}", f"{used[enough]:.3f}", beside))
        if enough < tokens:
            words += f" Its predictions get hardly better by what lies more than {_tokens(enough)} back."
    if "retrieval_weight_cache" in summary:
        words += f" Retrieval looks up the last {config['retrieval_window']:,} tokens as they were."
    return words, figures


def _good_for(record):
    summary = record.summary
    if "val_ppl" not in summary:
        words = "For nothing yet: it predicts no token before Phase 2, with which --phase both goes on."
        return words, _keys(summary)
    alone, counted = summary["val_ppl"], summary["val_ppl_kn"]
    side = "better" if _better(alone, counted) else "worse"
    words = (
        f"The network alone predicts the next token of held-out dialogues {side} than mere counting does, of "
    )
    words += "which tokens follow which in the training text."
    beside = f"counting (Kneser-Ney) {_number(counted, '.1f')}"
    if control := summary.get("val_ppl_untrained_context"):
        beside += f", on untrained contexts {control:.1f}"
    figures = [("perplexity of the network alone", _number(alone, ".1f"), beside)]
    if "val_ppl_retrieval" not in summary:
        return words + " Nothing is looked up in this run.", figures
    words += f" {network_share(summary)}"
    trust = {name: summary.get(f"retrieval_weight_{name}") for name in PARTS}
    weights = ", ".join(f"{PARTS[name]} {weight:.0%}" for name, weight in trust.items() if weight is not None)
    beside = f"without a network {summary['val_ppl_retrieval_counting']:.1f}"
    if "val_ppl_network_ngram" in summary:
        beside += f", without copying {summary['val_ppl_network_ngram']:.1f}"
    figures.append(("perplexity with all that is looked up", f"{summary['val_ppl_retrieval']:.1f}", beside))
    figures.append(("how far the mixture trusts each, on average", weights, "they add up to 100%"))
    return words, figures


def _keys(summary):
    """Of a run of Phase 1 alone: what its contexts are worth to find places that are alike."""
    found, untrained = (summary.get(f"val_ppl_retrieval_{name}_contexts") for name in ("phase1", "untrained"))
    if found is None or untrained is None:
        return []
    what = "perplexity of looking up, without a network, places whose contexts are alike"
    return [(what, f"{found:.1f}", f"untrained contexts {untrained:.1f}")]
