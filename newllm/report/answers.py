"""Four questions that a newcomer has about a run, answered in plain words from its record."""

from typing import NamedTuple

from newllm.report.record import as_curve, shown
from newllm.report.summary import end_of, network_share

QUESTIONS = (
    "Did Phase 1 train?",
    "Did it converge?",
    "How far does it remember?",
    "What is the model good for?",
)
LATER = "There is none: all of {} trains in Phase 2. It is here to compare with."
CONTROL = "There is none: nothing that {} keeps of a text is learned. It is a control."
IN_TURN = "Not measured: {} reads one token after the other."
STATE = "Not measured: {} has read the whole text; what its state keeps is not looked at."
NOTHING = "There is nothing to converge: "
BASELINES = {  # what they are, and what is answered to the first three questions
    "gru": ("a GRU", LATER, IN_TURN, STATE),
    "lstm": ("an LSTM", LATER, IN_TURN, STATE),
    "transformer": ("a Transformer", LATER, NOTHING + "{} reads all tokens at once, in one go.",
                    "The last {max_seq_length:,} tokens by construction: it has no more positions."),
    "window": ("a window of tokens", CONTROL, IN_TURN,
               "The last 8 tokens in order, and fading averages of all, by construction."),
    "token": ("a model of the last token alone", CONTROL, NOTHING + "it keeps nothing of a text.",
              "Not at all, by construction: it sees the last token alone."),
}  # fmt: skip
CLOSE, NEAR = 0.05, 0.1  # relative distances after ten sweeps: settled, and on the way
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
    if record.kind in BASELINES:
        name, *words = BASELINES[record.kind]
        given = [(text.format(name, **record.config), []) for text in words]
    else:
        given = [_trained(record), _converged(record), _remembers(record)]
    given[2] = _with_use(record, *given[2])
    given.append(_good_for(record.summary))
    return [Answer(question, *answer) for question, answer in zip(QUESTIONS, given, strict=True)]


def _number(value, form):
    """A figure as text; a record has null for what is no finite number."""
    return shown(value, form, "no finite number")


def _tokens(number):
    return "1 token" if number == 1 else f"{number:,.0f} tokens"


def _better(value, other):
    """Whether a figure is the smaller one; null counts as infinite."""
    return value is not None and (other is None or value < other)


def _figure(summary, what, key, form):
    """One of the contexts at the end, beside after Phase 1, if that was not the end, and untrained."""
    beside = f"untrained {_number(summary[f'{key}_untrained'], form)}"
    if end_of(summary) and summary["phase1_steps"]:
        beside = f"after Phase 1 {_number(summary[key], form)}, {beside}"
    return what, _number(summary[key + end_of(summary)], form), beside


def _trained(record):
    summary = record.summary
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
    summary, end = record.summary, end_of(record.summary)
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
            "them one by one."
        )
    if end and summary["phase1_steps"]:
        words += " Phase 2 went on to train the contexts, for prediction alone."
    return words, [
        _figure(summary, "distance from these contexts after 10 sweeps", "cold_start_error_10", ".1%"),
        _figure(summary, "tokens whose context hardly changes any more", "converged_ratio", ".1%"),
    ]


def _remembers(record):
    summary = record.summary
    horizon = summary[f"memory_horizon{end_of(summary)}"]
    beyond = ", as far as is measured" if horizon == max(as_curve(record.curves["memory_curve"])) else ""
    words = f"If a token is replaced by another, the context shows it up to {_tokens(horizon)} later{beyond}."
    read_back = "earlier tokens that a straight-line fit reads back from a context (past capacity)"
    return words, [
        _figure(summary, "tokens later that a change still shows", "memory_horizon", "d"),
        _figure(summary, read_back, "past_capacity", ".2f"),
    ]


def _with_use(record, words, figures):
    """What is said of memory, and how much of the text before predictions use."""
    summary, used = record.summary, as_curve(record.curves.get("bpb_by_context"))
    if used and "val_ppl" in summary and record.kind != "token" and None not in used.values():
        tokens, whole = [*used.items()][-1]
        enough = min(count for count, bits in used.items() if bits <= AS_GOOD * whole)
        beside = f"{whole:.3f} with all {tokens:.0f}, {used[1.0]:.3f} with the last one alone"
        figures.append((f"bits per byte with the last {_tokens(enough)}", f"{used[enough]:.3f}", beside))
        if enough < tokens:
            words += f" Its predictions get hardly better by what lies more than {_tokens(enough)} back."
    if "retrieval_weight_cache" in summary:
        words += f" Retrieval looks up the last {record.config['retrieval_window']:,} tokens as they were."
    return words, figures


def _good_for(summary):
    if "val_ppl" not in summary:
        words = "For nothing yet: it predicts no token before Phase 2, with which --phase both goes on."
        what = "perplexity of looking up, without a network, places whose contexts are alike"
        keys = (f"val_ppl_retrieval_{name}_contexts" for name in ("phase1", "untrained"))
        found, untrained = (shown(summary.get(key), ".1f") for key in keys)
        return words, [(what, found, f"untrained contexts {untrained}")] if found and untrained else []
    alone, counted = summary["val_ppl"], summary["val_ppl_kn"]
    side = "better" if _better(alone, counted) else "worse"
    words = (
        f"The network alone predicts the next token of held-out dialogues {side} than mere counting does, of "
        "which tokens follow which in the training text."
    )
    beside = f"counting (Kneser-Ney) {_number(counted, '.1f')}"
    if control := summary.get("val_ppl_untrained_context"):
        beside += f", on untrained contexts {control:.1f}"
    figures = [("perplexity of the network alone", _number(alone, ".1f"), beside)]
    if "val_ppl_retrieval" not in summary:
        return words + " Nothing is looked up in this run.", figures
    trust = {what: summary.get(f"retrieval_weight_{name}") for name, what in PARTS.items()}
    weights = ", ".join(f"{what} {weight:.0%}" for what, weight in trust.items() if weight is not None)
    beside = f"without a network {summary['val_ppl_retrieval_counting']:.1f}"
    if "val_ppl_network_ngram" in summary:
        beside += f", without copying {summary['val_ppl_network_ngram']:.1f}"
    figures.append(("perplexity with all that is looked up", f"{summary['val_ppl_retrieval']:.1f}", beside))
    figures.append(("how far the mixture trusts each, on average", weights, "they add up to 100%"))
    return f"{words} {network_share(summary)}", figures
