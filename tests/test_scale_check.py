"""test.py as a user runs it: its criteria, its exit status, one row a budget, and how time and memory grow."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import as_flags, run

import test as scale_check
import train
from config import ResidualConfig
from newllm.saving.stop import EXIT_STATUS

ROOT = Path(__file__).parent.parent


def test_the_scale_check_exits_by_its_criteria_and_leaves_a_run(tiny_settings, capsys):
    """`python3 test.py` prints the table with the untrained column; once more, the complete run reports at once."""
    done = run("test.py", tiny_settings)
    assert "criterion" in done.stdout and "untrained" in done.stdout, done.stderr
    assert done.returncode == (0 if done.stdout.rstrip().endswith("PASS") else 1)
    assert ("FAIL" in done.stdout) == (done.returncode == 1)
    again = run("test.py", tiny_settings)
    assert again.returncode == done.returncode and "== Phase" not in again.stdout
    peaks = [
        float(re.search(r"peak memory, MB +\| +([\d.]+)", text)[1]) for text in (done.stdout, again.stdout)
    ]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.1)  # of the run, not of the process that reports it


def test_the_peak_of_a_complete_run_is_that_of_its_training(tiny_settings, monkeypatch):
    """Not that of the process which reports it again."""
    monkeypatch.setattr(train, "peak_memory_mb", lambda: 5000.0)
    train.main(ResidualConfig(**tiny_settings | dict(model_type="gru")))
    monkeypatch.setattr(train, "peak_memory_mb", lambda: 400.0)
    assert train.main(ResidualConfig(**tiny_settings | dict(model_type="gru")))["peak_memory_mb"] == 5000.0


def test_an_untrained_network_fails_the_criteria(tiny_settings):
    """The figures of the untrained network, put in the trained ones' place, fail every gate that asks for training."""
    summary = train.main(ResidualConfig(**tiny_settings))
    untrained = summary | dict(phase1_steps=0, phase1_param_change=0.0, val_ppl=summary[scale_check.CONTROL])
    untrained |= {key: summary[f"{key}_untrained"] for key in summary if f"{key}_untrained" in summary}
    failed = {label for label, *_, verdict in scale_check.check(untrained) if verdict == "FAIL"}
    assert {
        "Phase 1 optimizer steps", "Phase 1 relative parameter change", "effective rank above untrained",
        "cold-start error after 10 sweeps", "val perplexity below untrained contexts",
    } <= failed  # fmt: skip


@pytest.mark.parametrize(
    "changes, phase1, untrained, phase2",  # whether Phase 1, untrained contexts and Phase 2 have gates
    [
        (dict(untrained_control=False), True, False, True),
        (dict(model_type="gru"), False, False, True),
        (dict(model_type="window"), False, False, True),
        (dict(phase1_max_iterations=0), True, True, True),
        (dict(freeze_context=True, whiten_context=True), True, True, True),
        (dict(phase="1"), True, True, False),
        (dict(tune_share=0.3), True, True, True),
    ],
    ids=str,
)
def test_every_run_ends_in_a_table(tiny_settings, monkeypatch, capsys, changes, phase1, untrained, phase2):
    """The gates whose figures the run has, rows of a ladder with blanks for the others, a verdict; never a traceback."""
    monkeypatch.setattr(scale_check, "call_apart", lambda function, config: function(config))
    ladder = (6, 12) if changes in (dict(model_type="gru"), dict(phase="1")) else ()
    settings = tiny_settings | dict(phase2_epochs=1, phase1_max_iterations=1) | changes
    passed = scale_check.main(ResidualConfig(**settings), ladder)
    out = capsys.readouterr().out
    for gate, there in (
        ("Phase 1 optimizer steps", phase1), ("effective rank, validation", phase1), ("cold-start error after", phase1),
        ("below untrained contexts", untrained and phase2), ("below the bigram", phase2), ("peak memory, MB", True),
    ):  # fmt: skip
        assert (gate in out) == there, gate
    assert out.endswith("\nPASS\n" if passed else "\nFAIL\n") and "tokens | seconds | " in out
    assert passed == (" FAIL\n" not in out.rsplit("\n\n", 1)[0])
    plots = list(Path(settings["checkpoint_dir"]).glob("outputs/plots/scale_ladder_*.png"))
    assert bool(plots) == bool(ladder) and out.count("== ") >= 2 * bool(ladder)


def summary(config, **more):
    """An invented summary whose time and memory are lines in the tokens, and which passes all gates."""
    tokens = config.train_tokens
    shares = dict.fromkeys(("er_train", "er_val", "converged_ratio"), 0.97)
    untrained = {f"{key}_untrained": 0.7 for key in shares} | {"cold_start_error_10_untrained": 1.0}
    figures = dict(cold_start_error_10=0.01, val_ppl=300.0, val_ppl_bigram=310.0) | {
        scale_check.CONTROL: 320.0
    }
    sizes = dict(train_tokens=tokens, seconds=10 + tokens / 100, peak_memory_mb=500 + tokens / 50)
    phase1 = dict(phase1_steps=9, phase1_param_change=1, sweeps_to_convergence=None, tok_per_s_phase1=6543.0)
    return shares | untrained | figures | sizes | phase1 | dict(data_source="x", tokenizer="bpe") | more


def test_a_fail_says_what_it_means_and_final_diff_where_it_went(tiny_settings, monkeypatch, capsys):
    """Under the table; nothing about failing where nothing failed; a gate that everybody passes says so."""
    missed = dict(cold_start_error_10=0.5, er_val_untrained=0.8)
    monkeypatch.setattr(train, "main", lambda config: summary(config, **missed))
    assert scale_check.main(ResidualConfig(**tiny_settings)) is False
    out = capsys.readouterr().out
    assert "final_diff: " in out and "cold-start error" in out and "FAIL: at least one figure" in out
    assert re.search(r"effective rank, validation +\| +0.97 \| +0.8 \| > 0.75 +\| PASS, untrained too", out)
    monkeypatch.setattr(train, "main", summary)
    assert scale_check.main(ResidualConfig(**tiny_settings)) is True
    assert "FAIL" not in capsys.readouterr().out


def test_budgets_are_made_and_their_growth_is_printed_and_drawn(tiny_settings, monkeypatch, capsys):
    """In one checkpoint_dir, each with its own number of samples; settings that a ladder makes idle are named."""
    made = []
    monkeypatch.setattr(scale_check, "call_apart", lambda _, config: made.append(config) or summary(config))
    config = ResidualConfig(**tiny_settings, max_minutes=5.0)
    assert scale_check.main(config, ladder=(100, 200, 400)) is True
    out = capsys.readouterr().out
    assert [run.num_samples for run in made] == [100, 200, 400] and {run.max_minutes for run in made} == {0.0}
    assert {run.checkpoint_dir for run in made} == {config.checkpoint_dir}
    assert out.startswith("note: num_samples 12 has no effect")
    assert "time = 10.0 s + 10 s per 1,000 tokens, R^2 1.0000" in out and "tokens x4.0, time x3.1" in out
    (row,) = (
        [cell.strip() for cell in line.split("|")] for line in out.splitlines() if line.startswith("9,600")
    )
    assert row[:5] == ["9,600", "106", "6,543", "", "692"] and row[9] == "never" and row[-1] == "PASS"
    (plot,) = Path(config.checkpoint_dir, "outputs", "plots").glob("scale_ladder_*.png")
    assert plot.stat().st_size > 10_000


def test_one_budget_has_no_growth_and_a_refused_picture_costs_no_verdict(tiny_settings, monkeypatch, capsys):
    """A line needs two points; the folder's name taken by a file is one warning."""
    monkeypatch.setattr(scale_check, "call_apart", lambda _, config: summary(config))
    config = ResidualConfig(**tiny_settings)
    scale_check.main(config, ladder=(100,))
    assert "R^2" not in capsys.readouterr().out and not Path(config.checkpoint_dir, "outputs").exists()
    Path(config.checkpoint_dir, "outputs").touch()
    scale_check.main(config, ladder=(100, 200))
    out = capsys.readouterr().out
    assert out.count("warning: ") == 1 and "cannot be written" in out and out.endswith("\nPASS\n")


def ladder(settings):
    """`test.py --ladder` as a process."""
    command = [sys.executable, "test.py", *as_flags(settings), "--ladder", "6,8"]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    threads = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process: the bits depend on it
    return subprocess.Popen(command, cwd=ROOT, text=True, env=threads, **pipes)


def trains(folder, name):
    """Whether a ladder's run has begun to train, by its status."""
    try:
        series, status = (json.loads((folder / file).read_text()) for file in ("series.json", "status.json"))
    except FileNotFoundError:
        return False
    in_hand = [run["name"] for run in series["runs"] if run["status"] == "running"]
    return in_hand == [name] and status["state"] == "running" and status.get("step", 0) > 0


@pytest.mark.slow
def test_stopped_in_its_second_budget_a_ladder_makes_only_what_is_missing(tiny_settings):
    """SIGTERM to the command alone is passed on and all is saved; the budget in hand ends with the bits of an uncut run."""
    folder, process = Path(tiny_settings["checkpoint_dir"]), ladder(tiny_settings)
    deadline = time.monotonic() + 120
    while not trains(folder, "samples_8") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_STATUS, errors
    assert errors.startswith("stopped: SIGTERM received; run the same command again")

    process = ladder(tiny_settings)
    out, errors = process.communicate()
    assert process.returncode in (0, 1) and out.count("criterion") == 2, errors
    assert len(list(folder.glob("*/logs/metrics_*.jsonl"))) == 2  # a run made twice would have two records
    losses = [run["metrics"]["val_loss"] for run in json.loads((folder / "series.json").read_text())["runs"]]
    alone = tiny_settings | dict(num_samples=8, checkpoint_dir=str(folder / "alone"))
    assert train.main(ResidualConfig(**alone))["val_loss"] == losses[1]
