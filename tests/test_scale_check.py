"""test.py as a user runs it: criteria, exit status, a row for each budget, how time and memory grow."""

import re
from pathlib import Path

import pytest
from helpers import run, stop_after

import test as scale_check
import train
from config import ResidualConfig
from newllm.report.series import read_series
from newllm.saving.stop import Stopped


@pytest.fixture
def in_process(monkeypatch):
    """A ladder's budgets in this process; that each has its own, and hears signals, is call_apart's."""
    monkeypatch.setattr(scale_check, "call_apart", lambda function, config: function(config))


def test_the_scale_check_exits_by_its_criteria_and_leaves_a_run(tiny_settings, capsys):
    """A table with the untrained column; once more, the complete run reports at once.

    Figures of the untrained network, put in the trained ones' place, fail every gate that asks for training.
    """
    done = run("test.py", tiny_settings)
    assert "criterion" in done.stdout and "untrained" in done.stdout, done.stderr
    assert done.returncode == (0 if done.stdout.rstrip().endswith("PASS") else 1)
    assert ("FAIL" in done.stdout) == (done.returncode == 1)

    config = ResidualConfig(**tiny_settings)
    assert scale_check.main(config) == (done.returncode == 0)
    assert "== Phase" not in capsys.readouterr().out
    summary = train.main(config)
    untrained = summary | dict(phase1_steps=0, phase1_param_change=0.0, val_ppl=summary[scale_check.CONTROL])
    untrained |= {key: summary[f"{key}_untrained"] for key in summary if f"{key}_untrained" in summary}
    failed = {criterion for criterion, *_, verdict in scale_check.check(untrained) if verdict == "FAIL"}
    assert {
        "Phase 1 optimizer steps",
        "Phase 1 relative parameter change",
        "effective rank above untrained",
        "cold-start error after 10 sweeps",
        "val perplexity below untrained contexts",
    } <= failed


def verdicts(**figures):
    """{figure: verdict} of the criteria on retrieval."""
    keys = {criterion: key for criterion, key, *_ in scale_check.GATES}
    return {keys[criterion]: verdict for criterion, *_, verdict in scale_check.check(figures)}


@pytest.mark.parametrize(
    "tokens, share",
    [(1_000, 0.02), (6_400, 0.02), (24_960, 0.08), (50_000, 0.14), (100_000, 0.2), (10**6, 0.2)],
)
def test_the_network_must_earn_its_place(tokens, share):
    """Below the same retrieval without one by a share that grows with the logarithm of the budget.

    What counting reaches fails at every budget; what an untrained network reaches too is called so.
    """
    counting = dict(train_tokens=tokens, val_ppl_retrieval_counting=100.0)
    for value, untrained, verdict in (
        (100.0, 101.0, "FAIL"),
        (100.5 - 100 * share, 101.0, "FAIL"),
        (99.5 - 100 * share, 101.0, "PASS"),
        (99.5 - 100 * share, 99.4 - 100 * share, "PASS, untrained too"),
        (99.5 - 100 * share, None, "PASS"),
    ):
        figures = dict(val_ppl_retrieval=value, val_ppl_retrieval_untrained=untrained)
        assert verdicts(**counting, **figures) == {"val_ppl_retrieval": verdict}
    assert verdicts(train_tokens=tokens, val_ppl_retrieval=1.0) == {}


def test_phase_1_must_make_better_keys_than_no_training():
    """By a tenth, which untrained contexts themselves never are."""
    trained, control = "val_ppl_retrieval_phase1_contexts", "val_ppl_retrieval_untrained_contexts"
    for value, verdict in ((100.0, "FAIL"), (90.1, "FAIL"), (89.9, "PASS")):
        assert verdicts(**{trained: value, control: 100.0}) == {trained: verdict}
    assert verdicts(**{control: 100.0}) == {}


def test_the_peak_of_a_complete_run_is_that_of_its_training(tiny_settings, monkeypatch):
    """Not that of the process which reports it again."""
    for measured in (5000.0, 400.0):
        monkeypatch.setattr(train, "peak_memory_mb", lambda measured=measured: measured)
        summary = train.main(ResidualConfig(**tiny_settings | dict(model_type="gru")))
        assert summary["peak_memory_mb"] == 5000.0


@pytest.mark.parametrize(
    "changes, ladder, phase1, untrained, phase2",  # whether Phase 1, untrained contexts, Phase 2 have gates
    [
        (dict(untrained_control=False), (), True, False, True),
        (dict(model_type="gru"), (6, 12), False, False, True),
        (dict(freeze_context=True, whiten_context=True), (), True, True, True),
        (dict(phase="1"), (6, 12), True, True, False),
    ],
    ids=str,
)
def test_every_run_ends_in_a_table(
    tiny_settings, in_process, capsys, changes, ladder, phase1, untrained, phase2
):
    """The gates whose figures it has, a ladder's rows with blanks for the others, a verdict; no traceback."""
    settings = tiny_settings | dict(phase2_epochs=1, phase1_max_iterations=1) | changes
    passed = scale_check.main(ResidualConfig(**settings), ladder)
    out = capsys.readouterr().out
    expected = {
        "Phase 1 optimizer steps": phase1,
        "effective rank, validation": phase1,
        "cold-start error after": phase1,
        "below untrained contexts": untrained and phase2,
        "below the bigram": phase2,
        "peak memory, MB": True,
    }
    assert {criterion: criterion in out for criterion in expected} == expected
    assert out.endswith("\nPASS\n" if passed else "\nFAIL\n") and "tokens | seconds | " in out
    plots = list(Path(settings["checkpoint_dir"]).glob("outputs/plots/scale_ladder_*.png"))
    assert bool(plots) == bool(ladder) and out.count("criterion") == max(1, len(ladder))


def summary(config, **more):
    """An invented summary whose time and memory are lines in the tokens, and which passes all gates."""
    tokens = config.train_tokens
    shares = dict.fromkeys(("er_train", "er_val", "converged_ratio"), 0.97)
    untrained = {f"{key}_untrained": 0.7 for key in shares} | {"cold_start_error_10_untrained": 1.0}
    figures = dict(cold_start_error_10=0.01, val_ppl=300.0, val_ppl_bigram=310.0)
    figures[scale_check.CONTROL] = 320.0
    sizes = dict(train_tokens=tokens, seconds=10 + tokens / 100, peak_memory_mb=500 + tokens / 50)
    phase1 = dict(phase1_steps=9, phase1_param_change=1, sweeps_to_convergence=None, tok_per_s_phase1=6543.0)
    return shares | untrained | figures | sizes | phase1 | dict(data_source="x", tokenizer="bpe") | more


def test_a_fail_says_what_it_means(tiny_settings, monkeypatch, capsys):
    """Under the table; a gate that everybody passes says so; one budget has no growth."""
    missed = dict(cold_start_error_10=0.5, er_val_untrained=0.8)
    monkeypatch.setattr(train, "main", lambda config: summary(config, **missed))
    assert scale_check.main(ResidualConfig(**tiny_settings)) is False
    out = capsys.readouterr().out
    assert "FAIL: at least one figure" in out and "R^2" not in out
    assert re.search(r"effective rank, validation +\| +0.97 \| +0.8 \| > 0.75 +\| PASS, untrained too", out)


def test_budgets_are_made_and_their_growth_is_printed_and_drawn(tiny_settings, monkeypatch, capsys):
    """In one folder, each with its own number of samples; settings that a ladder makes idle are named."""
    made = []
    monkeypatch.setattr(scale_check, "call_apart", lambda _, config: made.append(config) or summary(config))
    config = ResidualConfig(**tiny_settings, max_minutes=5.0)
    assert scale_check.main(config, ladder=(100, 200, 400)) is True
    out = capsys.readouterr().out
    assert [run.num_samples for run in made] == [100, 200, 400] and {run.max_minutes for run in made} == {0.0}
    assert {run.checkpoint_dir for run in made} == {config.checkpoint_dir}
    assert out.startswith("note: num_samples 12 has no effect") and "FAIL" not in out
    assert "time = 10.0 s + 10 s per 1,000 tokens, R^2 1.0000" in out
    (row,) = (line.split("|") for line in out.splitlines() if line.startswith("9,600"))
    row = [cell.strip() for cell in row]
    assert row[:6] == ["9,600", "106", "6,543", "", "", "692"] and row[10] == "never" and row[-1] == "PASS"
    (plot,) = Path(config.checkpoint_dir, "outputs", "plots").glob("scale_ladder_*.png")
    assert plot.stat().st_size > 10_000


def test_stopped_in_its_second_budget_a_ladder_makes_only_what_is_missing(
    tiny_settings, monkeypatch, in_process
):
    """All is saved; the budget in hand ends with the bits of an uncut run."""
    config = ResidualConfig(**tiny_settings, untrained_control=False)
    with monkeypatch.context() as patch, pytest.raises(Stopped):

        def stopped(main, own):
            if own.num_samples == 6:
                return main(own)
            stop_after(own, 5)
            raise Stopped("SIGTERM received")

        patch.setattr(scale_check, "call_apart", stopped)
        scale_check.main(config, (6, 8))
    scale_check.main(config, (6, 8))
    folder = Path(config.checkpoint_dir)
    assert len(list(folder.glob("*/logs/metrics_*.jsonl"))) == 2  # a run made twice would have two records
    losses = [run["metrics"]["val_loss"] for run in read_series(folder)["runs"]]
    alone = tiny_settings | dict(num_samples=8, checkpoint_dir=str(folder / "alone"))
    assert train.main(ResidualConfig(**alone, untrained_control=False))["val_loss"] == losses[1]
