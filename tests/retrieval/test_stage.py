"""The stage after Phase 2: which figures a run leaves, what another run takes over."""

import itertools
import math

import pytest

import train
from config import ResidualConfig
from newllm.report.answers import answers
from newllm.report.record import find_records, read_record

ALL = "ngram,cache,knn"
COUNTING, UNTRAINED = {"val_ppl_retrieval_counting"}, {"val_ppl_retrieval_untrained"}
BY_CONTEXTS = {"val_ppl_retrieval_phase1_contexts", "val_ppl_retrieval_untrained_contexts"}
WHOLE = {"val_ppl_retrieval", "val_ppl_retrieval_fixed"}


def weights(*experts):
    return {f"retrieval_{kind}_{name}" for kind in ("weight", "fixed_weight") for name in experts}


PARTS = {"val_ppl_network_ngram", "val_ppl_network_ngram_cache"} | weights("network", "ngram", "cache", "knn")
CASES = {
    "all": (dict(retrieval=ALL), WHOLE | COUNTING | UNTRAINED | BY_CONTEXTS | PARTS),
    "the text so far": (
        dict(retrieval="cache", retrieval_keys="contexts"),
        WHOLE | COUNTING | UNTRAINED | BY_CONTEXTS | weights("network", "cache"),
    ),
    "the training text": (
        dict(retrieval="ngram,knn", retrieval_keys="tokens", freeze_context=True),
        WHOLE | COUNTING | UNTRAINED | BY_CONTEXTS | {"val_ppl_network_ngram"}
        | weights("network", "ngram", "knn"),
    ),
    "counts alone": (
        dict(retrieval="ngram"), WHOLE | COUNTING | UNTRAINED | weights("network", "ngram"),
    ),
    "none": (dict(retrieval="none"), set()),
    "without the control": (
        dict(retrieval=ALL, untrained_control=False), WHOLE | COUNTING | BY_CONTEXTS | PARTS,
    ),
    "Phase 1 alone": (dict(retrieval=ALL, phase="1"), COUNTING | UNTRAINED | BY_CONTEXTS),
    "fitted on training dialogues": (
        dict(retrieval=ALL, fit_share=0.3), WHOLE | COUNTING | UNTRAINED | BY_CONTEXTS | PARTS,
    ),
    "gru": (dict(retrieval=ALL, model_type="gru"), WHOLE | COUNTING | PARTS),
    "transformer": (dict(retrieval=ALL, model_type="transformer"), WHOLE | COUNTING | PARTS),
    "window": (dict(retrieval=ALL, model_type="window"), WHOLE | COUNTING | PARTS),
    "token": (dict(retrieval=ALL, model_type="token"), WHOLE | COUNTING | PARTS),
    "whitened contexts": (dict(retrieval=ALL, freeze_context=True, whiten_context=True), set()),
}  # fmt: skip


@pytest.mark.parametrize("changes, keys", CASES.values(), ids=CASES)
def test_a_run_has_the_rows_of_what_it_looks_up(tiny_settings, capsys, changes, keys):
    """These and no others, in the block too; weights are shares; each figure is one of a distribution."""
    summary = train.main(ResidualConfig(**tiny_settings | changes))
    found = {
        key for key in summary if "retrieval_" in key or "network_" in key or key == "val_ppl_retrieval"
    } - {"retrieval_by_position"}
    assert {key for key in found if "bpb" not in key} == keys
    assert {f"val_ppl{key.removeprefix('val_bpb')}" for key in found if "bpb" in key} <= keys
    block = dict(line.split(": ", 1) for line in capsys.readouterr().out.split("\n---\n")[1].splitlines())
    assert keys <= block.keys() and all(1 < summary[key] < 1000 for key in keys if "ppl" in key)
    (record,) = map(read_record, find_records(tiny_settings["checkpoint_dir"]))
    assert all(answer.words.endswith(".") and "None" not in str(answer) for answer in answers(record))
    for kind in ("weight", "fixed_weight") if "val_ppl_retrieval" in keys else ():
        shares = [value for key, value in summary.items() if key.startswith(f"retrieval_{kind}_")]
        assert sum(shares) == pytest.approx(1, abs=1e-5) and min(shares) >= 0


def test_curves_along_a_dialogue_are_those_of_the_rows(tiny_settings):
    """Means over stretches of positions, of each mixture with one expert more; together they are its row."""
    summary = train.main(ResidualConfig(**tiny_settings | dict(retrieval=ALL)))
    curves = summary["retrieval_by_position"]
    assert list(curves) == ["network", "ngram", "cache", "knn", "counting"]
    rows = dict(zip(curves, ("val_ppl", "val_ppl_network_ngram", "val_ppl_network_ngram_cache",
                             "val_ppl_retrieval", "val_ppl_retrieval_counting"), strict=True))  # fmt: skip
    for name, curve in curves.items():
        assert list(curve) == [1, 2, 3, 4, 6, 8, 11, 16, 23, 24]
        ends = [0, *curve]
        total = sum(curve[end] * (end - begun) for begun, end in itertools.pairwise(ends))
        assert math.exp(total / 24) == pytest.approx(summary[rows[name]], rel=2e-3)


def test_a_run_takes_over_what_retrieval_does_not_shape(tiny_settings, capsys):
    """By another window nothing of both phases trains again; rows are those of a run made in one go."""
    given = tiny_settings | dict(retrieval=ALL, retrieval_window=10)
    other = train.main(ResidualConfig(**given | dict(retrieval_window=4096)))
    capsys.readouterr()
    taken = train.main(ResidualConfig(**given))
    said = capsys.readouterr().out
    assert "phase 1 | iteration" not in said and "phase2 | epoch" not in said
    alone = given | dict(checkpoint_dir=given["checkpoint_dir"] + "_alone")
    once = train.main(ResidualConfig(**alone))
    keys = {key for key in once if "ppl" in key or "weight" in key}
    assert {key: taken[key] for key in keys} == {key: once[key] for key in keys}
    for key in ("val_ppl_retrieval_phase1_contexts", "val_ppl_retrieval_untrained_contexts"):
        assert other[key] != once[key]
