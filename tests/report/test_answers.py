"""Four questions about a run: true sentences for every kind of model and every way to run, each figure beside
what gives it a meaning.
"""

from types import SimpleNamespace

import pytest

from newllm.report.answers import QUESTIONS, answers

PHASE1 = dict(
    phase1_steps=100, phase1_iterations=10, er_ceiling=0.99, rank_tokens=6400, er_val=0.889,
    er_val_untrained=0.683, converged_ratio=1.0, converged_ratio_untrained=0.073, cold_start_error_10=0.03,
    cold_start_error_10_untrained=1.135, memory_horizon=8, memory_horizon_untrained=64, past_capacity=0.19,
    past_capacity_untrained=0.0,
)  # fmt: skip
PHASE2 = dict(contexts="frozen", val_ppl=878.1, val_ppl_kn=728.3)
FINETUNED = dict(
    contexts="fine-tuned", er_val_finetuned=0.816, converged_ratio_finetuned=0.981,
    cold_start_error_10_finetuned=0.098, memory_horizon_finetuned=16, past_capacity_finetuned=0.18,
    val_ppl_untrained_context=877.0,
)  # fmt: skip
RETRIEVAL = dict(
    val_ppl_retrieval=307.0, val_ppl_retrieval_counting=319.1, val_ppl_network_ngram=697.0,
    retrieval_weight_network=0.22, retrieval_weight_ngram=0.51, retrieval_weight_cache=0.2,
    retrieval_weight_knn=0.07,
)  # fmt: skip
USED = {"1": 3.178, "2": 3.171, "4": 3.1638, "16": 3.163, "128": 3.163}


def asked(summary, changes=None, **curves):
    """The four Answers about a run with such figures."""
    config = dict(model_type="context", max_seq_length=128, phase1_shuffle=False, retrieval_window=4096)
    config |= changes or {}
    curves = {"memory_curve": {"0": 1.0, "8": 0.1, "64": 0.0}, "bpb_by_context": USED} | curves
    return answers(SimpleNamespace(kind=config["model_type"], summary=summary, config=config, curves=curves))


def untrained(**figures):
    """Phase 1 left out: what is measured after it is what was measured before."""
    same = {key: PHASE1[f"{key}_untrained"] for key in PHASE1 if f"{key}_untrained" in PHASE1}
    return PHASE1 | same | dict(phase1_steps=0, phase1_iterations=0) | figures


CASES = {  # a run: the beginnings of its four answers, or what stands in them
    "fine-tuned, with retrieval": (
        (PHASE1 | PHASE2 | FINETUNED | RETRIEVAL,),
        "Yes: 100 steps in 10 passes",
        "Nearly: ten sweeps",
        "up to 16 tokens later. Its predictions get hardly better by what lies more than 4 tokens back. "
        "Retrieval looks up the last 4,096 tokens",
        "worse than mere counting does, of which tokens follow which in the training text. Counting and "
        "copying reach 319.1 without any network; with it 307.0, 3.8% below",
    ),
    "frozen, nothing looked up": (
        (PHASE1 | PHASE2 | dict(val_ppl=700.0),),
        "Yes: 100 steps", "Yes: read by sweeps", "up to 8 tokens later. Its",
        "better than mere counting does, of which tokens follow which in the training text. Nothing is",
    ),
    "without Phase 1, frozen": (
        (untrained(**PHASE2),),
        "left out (phase1_max_iterations is 0): the contexts are those of an untrained network.",
        "No: ten sweeps", "up to 64 tokens later, as far as is measured.", "worse than",
    ),
    "without Phase 1, end to end": (
        (untrained(**PHASE2 | FINETUNED),),
        "left out (phase1_max_iterations is 0): the contexts learn in Phase 2.",
        "Nearly: ten sweeps", "up to 16 tokens later.", "worse than",
    ),
    "Phase 1 alone": (
        (PHASE1 | dict(contexts="fine-tuned"), None), "Yes: ", "Yes: ", "up to 8 tokens later.",
        "For nothing yet: it predicts no token before Phase 2, with which --phase both goes on.",
    ),
    "Phase 1 to no use, on shuffled tokens": (
        (PHASE1 | PHASE2 | dict(er_val=0.5, cold_start_error_10=None), dict(phase1_shuffle=True)),
        "Not to any use: 100 steps in 10 passes", "No: ten", "up to 8 tokens", "worse than",
    ),
    "gru": (
        (PHASE2 | RETRIEVAL, dict(model_type="gru")), "none: all of a GRU trains in Phase 2",
        "Not measured: a GRU reads", "Not measured: a GRU has read the whole text", "worse than",
    ),
    "transformer": (
        (PHASE2, dict(model_type="transformer")), "none: all of a Transformer", "nothing to converge",
        "The last 128 tokens by construction", "worse than",
    ),
    "window": (
        (PHASE2, dict(model_type="window")), "none: nothing that a window", "Not measured: a window",
        "The last 8 tokens in order, and fading averages of all, by construction. Its", "worse than",
    ),
    "token": (
        (PHASE2, dict(model_type="token")), "none: nothing", "nothing to converge", "Not at all",
        "worse than",
    ),
    "cut off": (({},), *["Not known: the run was cut off before its end, and the same command"] * 4),
}  # fmt: skip


@pytest.mark.parametrize("run, words", [(run, words) for run, *words in CASES.values()], ids=CASES)
def test_every_run_has_four_true_answers(run, words):
    """In the order of the questions, whole sentences; no figure without its meaning, and none is missing."""
    curves = {"bpb_by_context": None} if run[0] and "val_ppl" not in run[0] else {}
    given = asked(*run, **curves)
    assert [answer.question for answer in given] == list(QUESTIONS)
    for answer, expected in zip(given, words, strict=True):
        assert expected in answer.words and answer.words.endswith(".")
        assert all(what and value and beside for what, value, beside in answer.figures[:3])
        assert not {"None", "nan", "inf"} & set(str(answer).replace(")", " ").split())


def test_figures_stand_beside_what_they_mean():
    """Untrained, after Phase 1, counting, and each part of the mixture."""
    trained, converged, remembers, good = asked(PHASE1 | PHASE2 | FINETUNED | RETRIEVAL)
    assert trained.figures[0][1:] == ("88.9%", "untrained 68.3%, at most 99.0% to be seen in 6,400 tokens")
    assert converged.figures[0][1:] == ("9.8%", "after Phase 1 3.0%, untrained 113.5%")
    assert remembers.figures[0][1:] == ("16", "after Phase 1 8, untrained 64")
    assert remembers.figures[2] == (
        "bits per byte with the last 4 tokens", "3.164", "3.163 with all 128, 3.178 with the last one alone",
    )  # fmt: skip
    assert [figure[1:] for figure in good.figures] == [
        ("878.1", "counting (Kneser-Ney) 728.3, on untrained contexts 877.0"),
        ("307.0", "without a network 319.1, without copying 697.0"),
        ("the network 22%, counts 51%, the text so far 20%, the training text 7%", "they add up to 100%"),
    ]


def test_what_the_untrained_network_does_too_is_no_merit():
    """It converges as well: said, not claimed."""
    both = PHASE1 | PHASE2 | dict(cold_start_error_10_untrained=0.01)
    assert "no merit of the training" in asked(both)[1].words
    assert "no merit" not in asked(PHASE1 | PHASE2)[1].words


def test_what_is_no_number_is_said_so():
    """A record has null for it."""
    (_, value, beside), _ = asked(PHASE1 | PHASE2 | dict(cold_start_error_10=None))[1].figures
    assert value == "no finite number" and beside == "untrained 113.5%"
    assert asked(PHASE1 | PHASE2 | dict(val_ppl=None))[3].figures[0][1] == "no finite number"


def test_one_is_said_as_one_and_all_as_all():
    """What predictions use, where it is the last token alone, or all that there is."""
    one = asked(PHASE1 | PHASE2, bpb_by_context={"1": 3.0, "2": 3.0, "128": 3.0})[2]
    assert one.words.endswith("more than 1 token back.") and one.figures[2][0].endswith("last 1 token")
    whole = asked(PHASE1 | PHASE2, bpb_by_context={"1": 4.0, "2": 3.5, "128": 3.0})[2]
    assert "hardly" not in whole.words and whole.figures[2][:2] == (
        "bits per byte with the last 128 tokens",
        "3.000",
    )
    assert asked(PHASE1 | PHASE2 | dict(phase1_iterations=1))[0].words.startswith(
        "Yes: 100 steps in 1 pass over"
    )
