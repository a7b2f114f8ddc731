"""test.py as a user runs it: its criteria, its exit status, and one row a budget."""

import re
from pathlib import Path

import pytest
from helpers import run

import test as scale_check
import train
from config import ResidualConfig
from newllm.report.criteria import check


def test_the_scale_check_exits_by_its_criteria(tiny_settings):
    """`python3 test.py` prints the table with the untrained column, and its status says whether all passed."""
    done = run("test.py", tiny_settings)
    assert "criterion" in done.stdout and "untrained" in done.stdout, done.stderr
    assert done.returncode == (0 if done.stdout.rstrip().endswith("PASS") else 1)
    assert ("FAIL" in done.stdout) == (done.returncode == 1)
    assert not (Path(tiny_settings["checkpoint_dir"]) / "model_latest.pt").exists()


def test_an_untrained_network_fails_the_criteria(tiny_settings):
    """The figures of the untrained network, put in the trained ones' place, fail every gate that asks for training."""
    summary = train.main(ResidualConfig(**tiny_settings))
    untrained = summary | {
        "phase1_steps": 0,
        "phase1_param_change": 0.0,
        "val_ppl": summary["val_ppl_untrained_context"],
    }
    untrained |= {key: summary[f"{key}_untrained"] for key in summary if f"{key}_untrained" in summary}
    failed = {criterion.name for criterion in check(untrained) if not criterion.passed}
    assert {
        "Phase 1 optimizer steps", "Phase 1 relative parameter change", "effective rank above untrained",
        "cold-start error after 10 sweeps", "val perplexity below untrained contexts",
    } <= failed  # fmt: skip


SETTINGS = {  # changes of settings: whether Phase 1, untrained contexts and Phase 2 have gates
    "no control": (dict(untrained_control=False), True, False, True),
    "gru": (dict(model_type="gru"), False, False, True),
    "lstm": (dict(model_type="lstm"), False, False, True),
    "transformer": (dict(model_type="transformer"), False, False, True),
    "window": (dict(model_type="window"), False, False, True),
    "token": (dict(model_type="token"), False, False, True),
    "no Phase 1": (dict(phase1_max_iterations=0), True, True, True),
    "frozen": (dict(freeze_context=True), True, True, True),
    "whitened": (dict(freeze_context=True, whiten_context=True), True, True, True),
    "Phase 1 alone": (dict(phase="1"), True, False, False),
    "tuning": (dict(tune_share=0.3), True, True, True),
}


@pytest.mark.parametrize(
    ("name", "ladder"),
    [
        *((name, False) for name in SETTINGS),
        *((name, (6, 12)) for name in ("no control", "gru", "Phase 1 alone")),
    ],
)
def test_every_setting_ends_in_a_table(tiny_settings, monkeypatch, capsys, name, ladder):
    """The gates whose figures the run has, rows of the ladder with blanks for the others, a picture, a verdict; never a traceback."""
    changes, phase1, untrained, phase2 = SETTINGS[name]
    monkeypatch.setattr(scale_check, "call_apart", lambda function, config: function(config))
    settings = tiny_settings | dict(phase2_epochs=1, phase1_max_iterations=1) | changes
    passed = scale_check.main(ResidualConfig(**settings), ladder)
    out = capsys.readouterr().out
    for gate, there in (
        ("Phase 1 optimizer steps", phase1), ("effective rank, validation", phase1), ("cold-start error after 10 sweeps", phase1),
        ("val perplexity below untrained contexts", untrained), ("val perplexity below the bigram", phase2), ("peak memory, MB", True),
    ):  # fmt: skip
        assert (gate in out) == there, gate
    assert out.endswith("\nPASS\n" if passed else "\nFAIL\n") and "tokens | seconds | " in out
    assert passed == (" FAIL\n" not in out.rsplit("\n\n", 1)[0])
    assert bool(list(Path(settings["checkpoint_dir"]).glob("outputs/plots/scale_ladder_*.png"))) == bool(
        ladder
    )


def test_what_does_not_fit_is_a_sentence_before_anything_is_trained(tiny_settings):
    """Whitening contexts that are fine-tuned, a baseline without its only phase."""
    for changes in (["--whiten_context"], ["--model_type", "gru", "--phase", "1"]):
        done = run("test.py", tiny_settings, *changes)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "epoch" not in done.stdout


def test_a_fail_says_what_it_means_and_final_diff_where_it_went(tiny_settings, monkeypatch, capsys):
    """Under the table; nothing about failing where nothing failed."""
    config = ResidualConfig(**tiny_settings)
    gates = {
        "phase1_steps": 9,
        "er_val": 0.9,
        "er_val_untrained": 0.8,
        "cold_start_error_10": 0.5,
        "peak_memory_mb": 300.0,
    }
    summary = gates | {"train_tokens": 1, "data_source": "x", "tokenizer": "bpe", "seconds": 1.0}
    monkeypatch.setattr(train, "main", lambda _: summary)
    assert scale_check.main(config) is False
    out = capsys.readouterr().out
    assert "final_diff: " in out and "cold-start error" in out and "FAIL: at least one figure" in out
    assert re.search(r"effective rank, validation +\| +0.9 \| +0.8 \| > 0.75 +\| PASS, untrained too", out)
    monkeypatch.setattr(train, "main", lambda _: summary | {"cold_start_error_10": 0.01})
    assert scale_check.main(config) is True
    assert "FAIL" not in capsys.readouterr().out


def test_the_ladder_checks_every_budget_from_scratch(tiny_settings, monkeypatch, capsys):
    """One row a budget; no budget sees another's weights."""
    monkeypatch.setattr(scale_check, "LADDER", (6, 12))
    scale_check.main(ResidualConfig(**tiny_settings), ladder=True)
    out = capsys.readouterr().out
    assert "144 " in out and "288 " in out and out.count("== ") == 2
