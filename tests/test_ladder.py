"""`test.py --ladder` as a sweep: killed, stopped, with other settings, without stdin; only what is missing is made.

Its sizes come from the command line or from LADDER, and its table ends with how time and memory grow, also as a picture.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import test as scale_check
import train
from config import ResidualConfig
from newllm.errors import UserError
from newllm.flags import parse_args
from newllm.report.sweep import STATE_NAME
from newllm.saving.stop import EXIT_STATUS, Stopped

ROOT = Path(__file__).parent.parent
BUDGETS = (6, 8, 10)

LADDER = """
import json, os, signal, sys
import test
from config import ResidualConfig
from newllm.errors import exit_on_user_error
from newllm.report.sweep import Sweep

settings, kill_after = json.loads(sys.argv[1]), int(sys.argv[2])
change = Sweep._change

def killing(self, run, **fields):
    change(self, run, **fields)
    if sum(run["status"] == "done" for run in self.runs) == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)

Sweep._change = killing
test.LADDER = tuple(settings.pop("ladder"))
with exit_on_user_error():
    sys.exit(0 if test.main(ResidualConfig(**settings), ladder=True) else 1)
"""


def start(settings, kill_after=-1):
    """The ladder at small budgets with its stdin closed; it kills itself when so many budgets are done."""
    settings = settings | {"ladder": BUDGETS}
    command = [sys.executable, "-c", LADDER, json.dumps(settings), str(kill_after)]
    return subprocess.Popen(
        ["sh", "-c", 'exec "$@" <&-', "sh", *command], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def runs(settings):
    return json.loads((Path(settings["checkpoint_dir"]) / STATE_NAME).read_text())["runs"]


def wait_for_a_checkpoint(process, run_folder):
    deadline = time.monotonic() + 60
    while not (run_folder / "model_latest.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_between_and_inside_runs_only_what_is_missing_is_made(tiny_settings):
    """SIGKILL after the first budget, then within the second: that one goes on to the bits it would have ended with."""
    folder = Path(tiny_settings["checkpoint_dir"])
    process = start(tiny_settings, kill_after=1)
    assert process.communicate()[0].count("Sweep: ") == 0 and process.returncode == -signal.SIGKILL
    first = runs(tiny_settings)
    assert [run["status"] for run in first] == ["done", "pending", "pending"]

    process = start(tiny_settings)
    wait_for_a_checkpoint(process, folder / "samples_8")
    process.kill()
    process.communicate()
    second = runs(tiny_settings)
    assert [run["status"] for run in second] == ["done", "running", "pending"] and second[0] == first[0]

    process = start(tiny_settings)
    out, errors = process.communicate()
    assert process.returncode in (0, 1), errors
    third = runs(tiny_settings)
    assert [run["status"] for run in third] == ["done"] * 3 and third[0] == first[0]
    assert out.count("continuing run ") == 1 and out.count("\n---\n") == 2
    assert "Sweep: 3 runs, 2 done, 0 failed, 1 remaining | Elapsed: " in out
    for run in third:
        (record,) = Path(run["folder"]).glob("*/logs/metrics_*.jsonl")  # a run made twice would have two
        assert not list(Path(run["folder"]).glob("model_*.pt")), record
    alone = ResidualConfig(**tiny_settings | {"num_samples": 8, "checkpoint_dir": str(folder / "alone")})
    assert train.main(alone)["val_loss"] == third[1]["metrics"]["val_loss"]

    out, _ = (process := start(tiny_settings)).communicate()
    assert process.returncode in (0, 1) and "\n---\n" not in out and out.count("criterion") == 3
    assert runs(tiny_settings) == third
    fields = out.split("plot: ")
    assert (
        "time = " in fields[0]
        and "peak memory = " in fields[0]
        and Path(fields[1].splitlines()[0]).stat().st_size
    )


def test_stopped_by_a_signal_the_ladder_saves_and_says_how_to_go_on(tiny_settings):
    """SIGTERM to the command alone: exit status EXIT_STATUS, the budget in hand is saved and its folder free."""
    process = start(tiny_settings)
    run_folder = Path(tiny_settings["checkpoint_dir"]) / "samples_6"
    wait_for_a_checkpoint(process, run_folder)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_STATUS, errors
    assert errors.startswith("stopped: SIGTERM received; run the same command again")
    assert (run_folder / "model_latest.pt").exists() and not (run_folder / "run.lock").exists()
    assert [run["status"] for run in runs(tiny_settings)] == ["pending"] * 3


@pytest.fixture
def begun(tiny_settings, monkeypatch):
    """Configuration of a ladder that was stopped in its first run; `calls` gets those of later ones."""
    calls = []

    def stopped(function, config):
        calls.append(config)
        raise Stopped("SIGTERM received")

    monkeypatch.setattr(scale_check, "call_apart", stopped)
    config = ResidualConfig(**tiny_settings)
    with pytest.raises(Stopped):
        scale_check.main(config, ladder=True)
    calls.clear()
    return config, calls


def test_other_settings_are_refused_with_the_difference(begun):
    """What shapes the figures must agree; the state stays as it is."""
    config, calls = begun
    state = Path(config.checkpoint_dir) / STATE_NAME
    before = state.read_bytes()
    with pytest.raises(UserError, match=r"phase1_learning_rate 0\.002 -> 0\.001.*--checkpoint_dir"):
        scale_check.main(dataclasses.replace(config, phase1_learning_rate=0.001), ladder=True)
    assert state.read_bytes() == before and not calls


@pytest.mark.parametrize(
    "change", [dict(num_samples=7), dict(max_minutes=5.0), dict(save_every_n_batches=9)], ids=str
)
def test_settings_that_shape_no_figure_may_change(begun, change):
    """The ladder has its own budgets, and when to save or to stop is no part of the experiment."""
    config, calls = begun
    with pytest.raises(Stopped):
        scale_check.main(dataclasses.replace(config, **change), ladder=True)
    assert calls[0].num_samples == 50 and calls[0].load_checkpoint


def test_a_ladder_in_use_is_refused(begun, tiny_settings):
    """Two at once would make the same runs."""
    config, calls = begun
    process = start(tiny_settings | {"checkpoint_dir": config.checkpoint_dir, "load_checkpoint": False})
    wait_for_a_checkpoint(process, Path(config.checkpoint_dir) / "samples_6")
    with pytest.raises(UserError, match=str(process.pid)):
        scale_check.main(config, ladder=True)
    process.terminate()
    process.communicate(timeout=60)
    assert not calls


def test_the_ladder_starts_afresh_when_asked_to(begun):
    """`--no-load_checkpoint` takes neither the state nor a run's checkpoint."""
    config, calls = begun
    with pytest.raises(Stopped):
        scale_check.main(dataclasses.replace(config, dropout=0.2, load_checkpoint=False), ladder=True)
    assert not calls[0].load_checkpoint


def budgets_of(*flags):
    return parse_args(ResidualConfig, [*flags], extra=scale_check.add_ladder)[1].ladder


def test_sizes_come_in_ascending_order_and_default_to_those_of_the_ladder():
    """`--ladder` alone is True, without it the check is of one budget; a list may have blanks and is sorted."""
    assert budgets_of("--ladder") is True and budgets_of() is False
    assert budgets_of("--ladder", "--seed", "3") is True
    assert budgets_of("--ladder", "1953,195, 3906") == (195, 1953, 3906) and budgets_of("--ladder=7") == (7,)


@pytest.mark.parametrize("text", ["", "0", "195,-3", "195,195", "195;1953", "1.5", "many", "195,"])
def test_sizes_that_are_none_are_refused_in_one_sentence(text):
    """Positive, whole, each once; the sentence shows what was given and what would do."""
    with pytest.raises(UserError) as caught:
        budgets_of(f"--ladder={text}")
    assert str(caught.value) == (
        f"--ladder takes numbers of samples, positive and each once, like 195,1953,3906, not '{text}'."
    )


def summary(config):
    """An invented summary whose time and memory are lines in the tokens."""
    tokens = config.train_tokens
    same = {
        f"{key}{of}": 0.9 for key in ("er_train", "er_val", "converged_ratio") for of in ("", "_untrained")
    }
    same |= dict.fromkeys(("er_ceiling", "cold_start_error_10", "cold_start_error_10_untrained"), 0.01)
    same |= dict.fromkeys(("val_ppl", "val_ppl_untrained_context", "val_ppl_bigram", "memory_horizon"), 300.0)
    same |= dict(
        phase1_steps=9, phase1_param_change=0.5, sweeps_to_convergence=4, data_source="x", tokenizer="bpe"
    )
    speeds = dict(tok_per_s_phase1=6543.0, tok_per_s_phase2=1234.0)
    return (
        same | speeds | dict(train_tokens=tokens, seconds=10 + tokens / 100, peak_memory_mb=500 + tokens / 50)
    )


def test_the_budgets_asked_for_are_made_and_their_growth_is_printed_and_drawn(
    tiny_settings, monkeypatch, capsys
):
    """Given sizes alone; done already, the same command makes none of them and draws again. 24 tokens a sample."""
    made = []
    monkeypatch.setattr(
        scale_check, "call_apart", lambda _, config: made.append(config.num_samples) or summary(config)
    )
    config = ResidualConfig(**tiny_settings)
    for run in ("first", "second"):
        monkeypatch.setattr(scale_check, "new_run_id", lambda run=run: run)
        scale_check.main(config, ladder=(100, 200, 400))
        out = capsys.readouterr().out
        assert made == [100, 200, 400]
        assert "time = 10.0 s + 10 s per 1,000 tokens, R^2 1.0000" in out
        assert "peak memory = 500.0 MB + 20 MB per 1,000 tokens, R^2 1.0000" in out
        assert "tokens x4.0, time x3.1, peak memory x1.26" in out
        header, row = (line for line in out.splitlines() if line.startswith(("tokens |", "9,600")))
        cells = dict(
            zip(*([cell.strip() for cell in line.split("|")] for line in (header, row)), strict=True)
        )
        assert (cells["seconds"], cells["Phase 1 tok/s"], cells["Phase 2 tok/s"]) == ("106", "6,543", "1,234")
        assert (
            Path(config.checkpoint_dir, "outputs", "plots", f"scale_ladder_{run}.png").stat().st_size > 10_000
        )


def test_a_picture_that_cannot_be_written_costs_no_verdict(tiny_settings, monkeypatch, capsys):
    """Its folder's name is taken by a file: one warning, then the verdict as ever."""
    monkeypatch.setattr(scale_check, "call_apart", lambda _, config: summary(config))
    config = ResidualConfig(**tiny_settings)
    Path(config.checkpoint_dir).mkdir()
    Path(config.checkpoint_dir, "outputs").touch()
    scale_check.main(config, ladder=(100, 200))
    out = capsys.readouterr().out
    assert out.count("warning: ") == 1 and "cannot be written" in out and out.endswith("\nFAIL\n")


def test_one_budget_has_no_growth(tiny_settings, monkeypatch, capsys):
    """A line needs two points: no fit, no picture, but the table and the verdict."""
    monkeypatch.setattr(scale_check, "call_apart", lambda _, config: summary(config))
    config = ResidualConfig(**tiny_settings)
    scale_check.main(config, ladder=(100,))
    assert "R^2" not in capsys.readouterr().out and not Path(config.checkpoint_dir, "outputs").exists()


def test_settings_that_a_ladder_makes_idle_are_named(tiny_settings, monkeypatch, capsys):
    """The numbers of samples come from the ladder, and second copies are not made."""
    nothing = SimpleNamespace(finish=lambda work: [])
    monkeypatch.setattr(scale_check, "Sweep", lambda *args, **how: nothing)
    assert scale_check.climb(ResidualConfig(**tiny_settings, backup_dir="copies"), BUDGETS) == []
    named = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert named == ["backup_dir", "num_samples"]
