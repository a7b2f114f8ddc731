"""A sweep's state file: what is done is done, whatever ends the command, and every reader finds valid JSON."""

import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from newllm.errors import UserError
from newllm.report.record import StatusFile
from newllm.report.sweep import STATE_NAME, Sweep, progress, progress_line, read_sweep
from scripts import status

ROOT = Path(__file__).parents[2]
SETTINGS = {"learning_rate": 0.002, "seed": 42, "tokenizer": "bpe"}
SIZES = {"small": 1, "middle": 2, "large": 4}


class Killed(BaseException):
    pass


def strict(path):
    """The JSON of a file, by a reader that knows no NaN."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads(Path(path).read_text(), parse_constant=refuse)


def recorder(made, fail=(), end_at=None):
    """Work that records the runs it makes, fails at some of them, and ends the command at one."""

    def work(run):
        if run["name"] == end_at:
            raise Killed
        made.append(run["name"])
        if run["name"] in fail:
            raise UserError(f"no data for {run['name']}.")
        return {"val_loss": float(run["size"]), "seconds": 10.0 * run["size"]}

    return work


def statuses(folder):
    return [run["status"] for run in strict(folder / STATE_NAME)["runs"]]


def test_the_file_holds_every_run_with_its_figures(tmp_path):
    """Index, name, size, status, folder, metrics, seconds, time; and the figures come back in order."""
    figures = Sweep(tmp_path, SETTINGS, SIZES).finish(recorder([]))
    assert [row["val_loss"] for row in figures] == [1.0, 2.0, 4.0]
    for index, (run, name) in enumerate(zip(strict(tmp_path / STATE_NAME)["runs"], SIZES, strict=True)):
        assert run.pop("time").endswith("+00:00")
        assert run == {
            "index": index, "name": name, "size": SIZES[name], "status": "done", "folder": str(tmp_path / name),
            "metrics": figures[index], "seconds": 10.0 * SIZES[name],
        }  # fmt: skip


def test_while_a_run_is_made_the_file_says_so(tmp_path):
    """Before it begins, not only when it is over."""
    seen = []
    Sweep(tmp_path, SETTINGS, SIZES).finish(lambda run: seen.append(statuses(tmp_path)) or {})
    assert seen == [
        ["running", "pending", "pending"],
        ["done", "running", "pending"],
        ["done", "done", "running"],
    ]


def test_only_what_is_missing_is_made(tmp_path):
    """Ended at the second run, the next start makes the second and the third; a third start makes none."""
    made = []
    with pytest.raises(Killed):
        Sweep(tmp_path, SETTINGS, SIZES).finish(recorder(made, end_at="middle"))
    assert statuses(tmp_path) == ["done", "pending", "pending"] and made == ["small"]
    for _ in range(2):
        figures = Sweep(tmp_path, SETTINGS, SIZES).finish(recorder(made))
        assert [row["val_loss"] for row in figures] == [1.0, 2.0, 4.0] and made == list(SIZES)


def test_a_failed_run_is_named_and_keeps_no_other_from_being_made(tmp_path):
    """The command ends with one sentence; the same command then makes the failed one alone."""
    made = []
    with pytest.raises(UserError) as caught:
        Sweep(tmp_path, SETTINGS, SIZES).finish(recorder(made, fail=["middle"]))
    assert str(caught.value) == (
        "1 of 3 runs failed, the first of them (middle) because no data for middle: mend that and run the same command "
        "again, which makes only what is missing."
    )
    assert statuses(tmp_path) == ["done", "failed", "done"]
    assert strict(tmp_path / STATE_NAME)["runs"][1]["error"] == "no data for middle."
    made.clear()
    Sweep(tmp_path, SETTINGS, SIZES).finish(recorder(made))
    assert made == ["middle"] and "error" not in strict(tmp_path / STATE_NAME)["runs"][1]


@pytest.mark.parametrize(
    ("settings", "sizes", "difference"),
    [
        (SETTINGS | {"seed": 43}, SIZES, "seed 42 -> 43"),
        (SETTINGS | {"dropout": 0.1}, SIZES, "dropout None -> 0.1"),
    ],
    ids=["value", "new"],
)
def test_another_sweep_is_refused_with_the_difference(tmp_path, settings, sizes, difference):
    """Figures made with different settings do not stand in one table; the file stays as it is."""
    Sweep(tmp_path, SETTINGS, SIZES).finish(recorder([]))
    before = (tmp_path / STATE_NAME).read_bytes()
    with pytest.raises(UserError) as caught:
        Sweep(tmp_path, settings, sizes)
    assert difference in str(caught.value) and "--checkpoint_dir" in str(caught.value)
    assert (tmp_path / STATE_NAME).read_bytes() == before
    made = []
    Sweep(tmp_path, settings, sizes, fresh=True).finish(recorder(made))
    assert made == list(sizes)


def test_other_runs_of_the_same_settings_keep_what_is_done(tmp_path):
    """Fewer, then more: nothing is made twice, figures are of the runs asked for alone, the file keeps them all."""
    made = []
    Sweep(tmp_path, SETTINGS, SIZES).finish(recorder(made))
    figures = Sweep(tmp_path, SETTINGS, {"huge": 8, "small": 1}).finish(recorder(made))
    assert [row["val_loss"] for row in figures] == [8.0, 1.0] and made == [*SIZES, "huge"]
    assert [run["name"] for run in strict(tmp_path / STATE_NAME)["runs"]] == [
        "middle",
        "large",
        "huge",
        "small",
    ]
    assert read_sweep(tmp_path)["state"] == "complete"
    Sweep(tmp_path, SETTINGS, SIZES).finish(recorder(made))
    assert made == [*SIZES, "huge"]


def test_what_is_made_may_be_known_elsewhere(tmp_path):
    """Then the file does not count: a run that it calls done is made when its figures are gone, and the other way round."""
    Sweep(tmp_path, SETTINGS, {"small": 1}).finish(recorder([]))
    made = []
    elsewhere = {"middle": {"val_loss": 7.0}}
    figures = Sweep(tmp_path, SETTINGS, SIZES, made=elsewhere.get).finish(recorder(made))
    assert made == ["small", "large"] and [row["val_loss"] for row in figures] == [1.0, 7.0, 4.0]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"runs": 3, "settings": {}}', "\x00"])
def test_a_file_that_is_no_state_is_refused(tmp_path, content):
    """One sentence, for the command and for the status; no silent fresh start."""
    (tmp_path / STATE_NAME).write_text(content)
    for read in (lambda: Sweep(tmp_path, SETTINGS, SIZES), lambda: read_sweep(tmp_path)):
        with pytest.raises(UserError, match="cannot be read"):
            read()
    assert (tmp_path / STATE_NAME).read_text() == content


def test_a_disk_that_refuses_is_said_once_and_does_not_end_the_sweep(tmp_path, monkeypatch, capsys):
    """The runs are made; the file that was there is whole."""
    sweep = Sweep(tmp_path, SETTINGS, SIZES)
    before = (tmp_path / STATE_NAME).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert len(sweep.finish(recorder([]))) == 3
    assert capsys.readouterr().out.count("cannot be written (No space left on device)") == 1
    assert (tmp_path / STATE_NAME).read_bytes() == before and os.listdir(tmp_path) == [STATE_NAME]


def test_figures_that_are_not_finite_survive_a_restart(tmp_path):
    """JSON has no NaN and no infinity; None and text stay what they are."""
    metrics = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": None, "e": "bpe", "f": 0.1 + 0.2, "g": True}
    for _ in range(2):
        (got,) = Sweep(tmp_path, SETTINGS, {"one": 1}).finish(lambda run: metrics)
        strict(tmp_path / STATE_NAME)
        assert math.isnan(got.pop("a")) and got == {name: metrics[name] for name in "bcdefg"}


def test_checkpoints_of_done_runs_go_and_those_of_others_stay(tmp_path):
    """The record of each run is kept; weights of a run that was cut off are what it continues from."""

    def work(run):
        folder = Path(run["folder"])
        folder.mkdir()
        for name in ("model_latest.pt", "model_best.pt", "manifest.json", "metrics.jsonl"):
            (folder / name).touch()
        if run["name"] == "middle":
            raise Killed
        return {}

    with pytest.raises(Killed):
        Sweep(tmp_path, SETTINGS, SIZES).finish(work)
    assert os.listdir(tmp_path / "small") == ["metrics.jsonl"]
    assert len(os.listdir(tmp_path / "middle")) == 4


def test_after_each_run_a_line_says_how_far_the_sweep_is(tmp_path, capsys):
    """Total, done, remaining, elapsed, ETA: 10 s for each unit of size."""
    Sweep(tmp_path, SETTINGS, SIZES).finish(recorder([]))
    assert capsys.readouterr().out.splitlines() == [
        "Sweep: 3 runs, 1 done, 0 failed, 2 remaining | Elapsed: 10s | ETA: 60s",
        "Sweep: 3 runs, 2 done, 0 failed, 1 remaining | Elapsed: 30s | ETA: 40s",
        "Sweep: 3 runs, 3 done, 0 failed, 0 remaining | Elapsed: 70s | ETA: 0s",
    ]


def test_before_a_run_is_done_the_time_left_is_unknown(tmp_path):
    """Nothing to judge by."""
    counts = progress(Sweep(tmp_path, SETTINGS, SIZES).runs)
    assert counts["eta_s"] is None and progress_line(counts).endswith("ETA: unknown")


def test_the_time_of_the_run_in_hand_counts_while_its_process_lives(tmp_path):
    """Begun 30 s ago: 30 s more have elapsed, and 30 s less are left; not so when the process is gone."""
    Sweep(tmp_path, SETTINGS, SIZES).finish(recorder([]))
    state = strict(tmp_path / STATE_NAME)
    begun = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() - 30))
    state["runs"][2] |= {"status": "running", "metrics": None, "seconds": 0.0, "time": begun}
    (tmp_path / STATE_NAME).write_text(json.dumps(state))
    found = read_sweep(tmp_path)
    assert found["state"] == "running" and (found["done"], found["remaining"]) == (2, 1)
    assert found["elapsed_s"] == pytest.approx(60, abs=3) and found["eta_s"] == pytest.approx(10, abs=3)
    (tmp_path / STATE_NAME).write_text(json.dumps(state | {"pid": 2**22 + 1}))
    found = read_sweep(tmp_path)
    assert found["state"].startswith("cut off") and found["elapsed_s"] == 30 and found["eta_s"] == 40


def test_the_status_command_shows_the_sweep_and_the_run_in_hand(tmp_path, capsys):
    """As lines and as one JSON object."""

    def work(run):
        if run["name"] == "middle":
            Path(run["folder"]).mkdir()
            StatusFile(run["folder"], run_id="r7").update(now=True, stage="phase2", epoch=3, epochs=10)
            status.main(["--checkpoint_dir", str(tmp_path)])
            status.main(["--checkpoint_dir", str(tmp_path), "--json"])
        return {"seconds": 5.0}

    Sweep(tmp_path, SETTINGS, SIZES).finish(work)
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith("Sweep: 3 runs, 1 done, 0 failed, 2 remaining | Elapsed: ")
    assert out[1].endswith(" (running)") and out[3].startswith("  middle: running, ")
    assert "Run: r7 (running)" in out and "Phase: phase2" in out and "Epoch: 3/10" in out
    fields = json.loads(next(line for line in out if line.startswith("{")))
    assert fields["stage"] == "phase2" and fields["sweep"]["state"] == "running"
    assert (fields["sweep"]["total"], fields["sweep"]["done"], fields["sweep"]["remaining"]) == (3, 1, 2)
    assert [run["status"] for run in fields["sweep"]["runs"]] == ["done", "running", "pending"]


def test_the_status_command_needs_no_run_in_hand(tmp_path, capsys):
    """A complete sweep has none."""
    Sweep(tmp_path, SETTINGS, SIZES).finish(recorder([]))
    capsys.readouterr()
    status.main(["--checkpoint_dir", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["sweep"]["state"] == "complete"
    status.main(["--checkpoint_dir", str(tmp_path)])
    assert "(complete)" in capsys.readouterr().out


MAKE_MANY = """
import sys
from newllm.report.sweep import Sweep

def work(run):
    with open(sys.argv[2], "a") as made:
        made.write(run["name"] + " ")
    return {"x": run["index"]}

Sweep(sys.argv[1], {}, {f"run_{n}": 1 for n in range(int(sys.argv[3]))}).finish(work)
"""


def test_killed_at_any_moment_the_file_is_valid_and_no_done_run_is_made_again(tmp_path):
    """SIGKILL three times among 300 short runs; at most the run in hand is made twice."""
    source, made = random.Random(0), tmp_path / "made"
    made.touch()
    command = [sys.executable, "-c", MAKE_MANY, str(tmp_path), str(made), "300"]
    for kills in range(4):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        enough = len(made.read_text().split()) + source.randrange(20, 60)
        while process.poll() is None and (kills == 3 or len(made.read_text().split()) < enough):
            time.sleep(source.uniform(0, 0.01))
            if (tmp_path / STATE_NAME).exists():
                strict(tmp_path / STATE_NAME)
        process.kill()
        assert process.wait() == (0 if kills == 3 else -9)
        done = [run["name"] for run in strict(tmp_path / STATE_NAME)["runs"] if run["status"] == "done"]
        names = made.read_text().split()
        assert set(done) <= set(names) and len(names) - len(set(names)) <= kills
    assert len(done) == 300 and read_sweep(tmp_path)["state"] == "complete"
