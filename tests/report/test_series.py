"""Several runs in a row: what fails is named, what is done is not made again, and the status tells how far it is."""

import json
import math
import time

import pytest

from newllm.errors import UserError
from newllm.report import series
from newllm.report.record import StatusFile
from newllm.report.series import SERIES_NAME, make_series, progress_line, read_series, whole_numbers
from scripts import status

SIZES = {"small": 1, "middle": 2, "large": 4}
RUNS = {name: {"size": size, "folder": name} for name, size in SIZES.items()}


class Killed(BaseException):
    pass


def recorder(made, fail="", end_at=""):
    """Work that records the runs it makes, fails at one of them, and ends the command at one."""

    def work(name):
        if name == end_at:
            raise Killed
        made.append(name)
        if name == fail:
            raise UserError(f"no data for {name}.")
        return {"val_loss": math.nan, "seconds": 10.0 * SIZES[name], "curve": [1, 2]}

    return work


def statuses(folder):
    return [run["status"] for run in read_series(folder)["runs"]]


def test_summaries_come_back_in_order_and_the_file_tells_of_every_run(tmp_path, capsys):
    """While a run is made it says so; after each a line says how far: 10 s for each unit of size."""
    seen, work = [], recorder([])
    summaries = make_series(tmp_path, RUNS, lambda name: seen.append(statuses(tmp_path)) or work(name))
    assert [summary["seconds"] for summary in summaries] == [10.0, 20.0, 40.0]
    assert seen == [
        ["running", "pending", "pending"],
        ["done", "running", "pending"],
        ["done", "done", "running"],
    ]
    for run in read_series(tmp_path)["runs"]:
        assert run.pop("begun") > 0 and run.pop("status") == "done"
        metrics = {"val_loss": None, "seconds": 10.0 * run["size"]}  # JSON has no NaN
        assert run == {"name": run["name"], "metrics": metrics} | RUNS[run["name"]]
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
        make_series(tmp_path, RUNS, recorder([], fail="middle"))
    assert str(caught.value) == (
        "1 of 3 runs failed, the first of them (middle) because no data for middle: mend that and run the same command "
        "again, which makes only what is missing."
    )
    assert statuses(tmp_path) == ["done", "failed", "done"]


def test_a_disk_that_refuses_does_not_end_the_series(tmp_path, monkeypatch):
    """Nobody can watch, but the runs are made."""
    monkeypatch.setattr(series, "write_text", lambda *_: (tmp_path / "absent").unlink())
    assert len(make_series(tmp_path, RUNS, recorder([]))) == 3 and read_series(tmp_path) is None


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
        (tmp_path / name).mkdir()
        StatusFile(tmp_path / name, run_id=name).update(now=True, stage="phase2", epoch=3, epochs=10)
        status.main(["--checkpoint_dir", str(tmp_path)])
        status.main(["--checkpoint_dir", str(tmp_path), "--json"])
        return {"seconds": 5.0}

    make_series(tmp_path, {"r7": {"size": 1, "folder": "r7"}}, work)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("Runs: 1, 0 done, 0 failed, 1 remaining | Elapsed: ") and out[0].endswith(
        " (running)"
    )
    assert out[1:5] == ["  r7: running", "Run: r7 (running)", "Phase: phase2", "Epoch: 3/10"]
    fields = json.loads(next(line for line in out if line.startswith("{")))
    assert (fields["stage"], fields["series"]["state"], fields["series"]["remaining"]) == (
        "phase2",
        "running",
        1,
    )
    status.main(["--checkpoint_dir", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["series"]["state"] == "complete"


@pytest.mark.parametrize("text", ["", "0", "195,-3", "195,195", "195;1953", "1.5", "many", "195,"])
def test_numbers_that_are_none_are_refused_in_one_sentence(text):
    """Positive, whole, each once; the sentence shows what was given and what would do. Others come in order."""
    assert whole_numbers("--ladder")("1953,195, 3_906") == (195, 1953, 3906)
    with pytest.raises(UserError) as caught:
        whole_numbers("--ladder")(text)
    assert str(caught.value) == (
        f"--ladder takes whole numbers, positive and each once, like 195,1953,3906, not '{text}'."
    )
