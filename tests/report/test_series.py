"""Several runs in a row: what fails is named, what is done is not made again, and the status tells how far it is."""

import json
import math
import os
import time

import pytest

from newllm.errors import UserError
from newllm.report.series import SERIES_NAME, make_series, progress_line, read_series, whole_numbers
from newllm.report.status import StatusFile
from scripts import status

RUNS = {
    "small": {"size": 1, "folder": "a"},
    "middle": {"size": 2, "folder": "b"},
    "large": {"size": 4, "folder": "c"},
}


class Killed(BaseException):
    pass


def strict(folder):
    """The runs of the folder's file, by a reader that knows no NaN."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads((folder / SERIES_NAME).read_text(), parse_constant=refuse)["runs"]


def recorder(made, fail=(), end_at=None):
    """Work that records the runs it makes, fails at some of them, and ends the command at one."""

    def work(name):
        if name == end_at:
            raise Killed
        made.append(name)
        if name in fail:
            raise UserError(f"no data for {name}.")
        return {"val_loss": float(RUNS[name]["size"]), "seconds": 10.0 * RUNS[name]["size"], "curve": [1, 2]}

    return work


def statuses(folder):
    return [run["status"] for run in strict(folder)]


def test_summaries_come_back_in_order_and_the_file_tells_of_every_run(tmp_path, capsys):
    """While a run is made it says so; after each a line says how far: 10 s for each unit of size."""
    seen, work = [], recorder([])
    summaries = make_series(tmp_path, RUNS, lambda name: seen.append(statuses(tmp_path)) or work(name))
    assert [summary["val_loss"] for summary in summaries] == [1.0, 2.0, 4.0]
    assert seen == [
        ["running", "pending", "pending"],
        ["done", "running", "pending"],
        ["done", "done", "running"],
    ]
    for run, summary in zip(strict(tmp_path), summaries, strict=True):
        assert run.pop("begun") > 0 and run == {"name": run["name"], "status": "done"} | RUNS[run["name"]] | {
            "metrics": {"val_loss": summary["val_loss"], "seconds": summary["seconds"]}
        }
    assert capsys.readouterr().out.splitlines() == [
        "Runs: 3, 1 done, 0 failed, 2 remaining | Elapsed: 10s | ETA: 60s",
        "Runs: 3, 2 done, 0 failed, 1 remaining | Elapsed: 30s | ETA: 40s",
        "Runs: 3, 3 done, 0 failed, 0 remaining | Elapsed: 70s | ETA: 0s",
    ]


def test_what_is_done_is_not_made_and_what_ends_the_command_ends_the_series(tmp_path):
    """Ended at the third run, which then waits; nothing of the file decides what a next start makes."""
    made, done = [], {"small": {"seconds": 5.0}}
    with pytest.raises(Killed):
        make_series(tmp_path, RUNS, recorder(made, end_at="large"), done)
    assert made == ["middle"] and statuses(tmp_path) == ["done", "done", "pending"]
    assert read_series(tmp_path)["state"].startswith("cut off")
    assert make_series(tmp_path, RUNS, recorder(made), done)[0] is done["small"]
    assert made == ["middle", "middle", "large"] and read_series(tmp_path)["state"] == "complete"


def test_a_failed_run_is_named_and_keeps_no_other_from_being_made(tmp_path):
    """The command ends with one sentence."""
    with pytest.raises(UserError) as caught:
        make_series(tmp_path, RUNS, recorder([], fail=["middle"]))
    assert str(caught.value) == (
        "1 of 3 runs failed, the first of them (middle) because no data for middle: mend that and run the same command "
        "again, which makes only what is missing."
    )
    assert (
        statuses(tmp_path) == ["done", "failed", "done"]
        and strict(tmp_path)[1]["error"] == "no data for middle."
    )


def test_figures_that_are_not_finite_leave_valid_json(tmp_path):
    """JSON has no NaN and no infinity."""
    figures = {"a": math.nan, "b": -math.inf, "c": None, "d": 0.1 + 0.2, "seconds": 1.0}
    make_series(tmp_path, {"one": {"size": 1, "folder": "."}}, lambda name: figures)
    assert strict(tmp_path)[0]["metrics"] == figures | {"a": None, "b": None}


def test_a_disk_that_refuses_does_not_end_the_series(tmp_path, monkeypatch):
    """The runs are made; the file that was there is whole."""
    make_series(tmp_path, RUNS, recorder([]))
    before = (tmp_path / SERIES_NAME).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert len(make_series(tmp_path, RUNS, recorder([]))) == 3
    assert (tmp_path / SERIES_NAME).read_bytes() == before and os.listdir(tmp_path) == [SERIES_NAME]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"runs": 3}', "\x00"])
def test_a_file_that_is_no_series_is_refused(tmp_path, content):
    """One sentence, and the file stays."""
    (tmp_path / SERIES_NAME).write_text(content)
    with pytest.raises(UserError, match="cannot be read"):
        read_series(tmp_path)
    assert (tmp_path / SERIES_NAME).read_text() == content


def test_the_time_of_the_run_in_hand_counts_while_its_process_lives(tmp_path):
    """Begun 30 s ago: 30 s more have elapsed, and 30 s less are left; not so when the process is gone."""
    make_series(tmp_path, RUNS, recorder([]))
    fields = json.loads((tmp_path / SERIES_NAME).read_text())
    fields["runs"][2] |= {"status": "running", "metrics": {}, "begun": time.time() - 30}
    (tmp_path / SERIES_NAME).write_text(json.dumps(fields))
    found = read_series(tmp_path)
    assert found["state"] == "running" and (found["done"], found["remaining"]) == (2, 1)
    assert found["elapsed_s"] == pytest.approx(60, abs=3) and found["eta_s"] == pytest.approx(10, abs=3)
    (tmp_path / SERIES_NAME).write_text(json.dumps(fields | {"pid": 2**22 + 1}))
    found = read_series(tmp_path)
    assert found["state"].startswith("cut off") and found["elapsed_s"] == 30 and found["eta_s"] == 40
    assert progress_line(found | {"eta_s": None}).endswith("ETA: unknown")


def test_the_status_command_shows_the_series_and_the_run_in_hand(tmp_path, capsys):
    """As lines and as one JSON object; a complete series needs no run in hand."""

    def work(name):
        if name == "middle":
            (tmp_path / "b").mkdir()
            StatusFile(tmp_path / "b", run_id="r7").update(now=True, stage="phase2", epoch=3, epochs=10)
            status.main(["--checkpoint_dir", str(tmp_path)])
            status.main(["--checkpoint_dir", str(tmp_path), "--json"])
        return {"seconds": 5.0}

    make_series(tmp_path, RUNS, work)
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith("Runs: 3, 1 done, 0 failed, 2 remaining | Elapsed: ")
    assert out[1].endswith(" (running)") and out[3] == "  middle: running"
    assert "Run: r7 (running)" in out and "Phase: phase2" in out and "Epoch: 3/10" in out
    fields = json.loads(next(line for line in out if line.startswith("{")))
    assert fields["stage"] == "phase2" and fields["series"]["state"] == "running"
    assert [run["status"] for run in fields["series"]["runs"]] == ["done", "running", "pending"]
    status.main(["--checkpoint_dir", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["series"]["state"] == "complete"


def test_numbers_come_in_ascending_order():
    """Blanks and underscores are fine."""
    assert whole_numbers("--ladder")("1953,195, 3906") == (195, 1953, 3906)
    assert whole_numbers("--tokens")("100_000") == (100_000,)


@pytest.mark.parametrize("text", ["", "0", "195,-3", "195,195", "195;1953", "1.5", "many", "195,"])
def test_numbers_that_are_none_are_refused_in_one_sentence(text):
    """Positive, whole, each once; the sentence shows what was given and what would do."""
    with pytest.raises(UserError) as caught:
        whole_numbers("--ladder")(text)
    assert str(caught.value) == (
        f"--ladder takes whole numbers, positive and each once, like 195,1953,3906, not '{text}'."
    )
