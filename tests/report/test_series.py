"""Several runs in a row: what fails is named, what is done is not made again, the status tells how far."""

import json
import math

import pytest

from newllm.errors import UserError
from newllm.report.record import RunLog
from newllm.report.series import SERIES_NAME, make_series, read_series
from scripts import status

SIZES = {"small": 1, "middle": 2, "large": 4}
RUNS = {name: {"size": size, "folder": name} for name, size in SIZES.items()}


def recorder(made, failing="", ending=""):
    """Work that records the runs it makes, fails at one of them, and ends the command at one."""

    def work(name):
        if name == ending:
            raise KeyboardInterrupt
        made.append(name)
        if name == failing:
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
    assert seen == [["done"] * n + ["running"] + ["pending"] * (2 - n) for n in range(3)]
    for run in read_series(tmp_path)["runs"]:
        assert run["status"] == "done" and run["folder"] == run["name"]
        assert run["metrics"] == {"val_loss": None, "seconds": 10.0 * run["size"]}  # JSON has no NaN
    assert capsys.readouterr().out.splitlines() == [
        "Runs: 3, 1 done, 0 failed, 2 remaining | Elapsed: 10s | ETA: 60s",
        "Runs: 3, 2 done, 0 failed, 1 remaining | Elapsed: 30s | ETA: 40s",
        "Runs: 3, 3 done, 0 failed, 0 remaining | Elapsed: 70s | ETA: 0s",
    ]


def test_what_is_done_is_not_made_and_what_ends_the_command_ends_the_series(tmp_path):
    """Ended at the third run, which then waits; nothing of the file decides what a next start makes."""
    made, done = [], {"small": {"seconds": 5.0}}
    with pytest.raises(KeyboardInterrupt):
        make_series(tmp_path, RUNS, recorder(made, ending="large"), done)
    assert made == ["middle"] and statuses(tmp_path) == ["done", "done", "pending"]
    assert read_series(tmp_path)["state"].startswith("cut off")
    assert make_series(tmp_path, RUNS, recorder(made), done)[0] is done["small"]
    assert made == ["middle", "middle", "large"] and read_series(tmp_path)["state"] == "complete"


def test_a_failed_run_is_named_and_keeps_no_other_from_being_made(tmp_path):
    """The command ends with one sentence."""
    sentence = r"1 of 3 runs failed, the first of them \(middle failed: no data for middle\): mend that and"
    with pytest.raises(UserError, match=sentence):
        make_series(tmp_path, RUNS, recorder([], failing="middle"))
    assert statuses(tmp_path) == ["done", "failed", "done"]


def test_a_series_whose_process_is_gone_was_cut_off(tmp_path):
    """The run in hand counts as one that remains."""
    make_series(tmp_path, RUNS, recorder([]))
    fields = json.loads((tmp_path / SERIES_NAME).read_text())
    fields["runs"][2] |= {"status": "running", "metrics": {}}
    for pid, state in ((fields["pid"], "running"), (2**22 + 1, "cut off; the same command continues it")):
        (tmp_path / SERIES_NAME).write_text(json.dumps(fields | {"pid": pid}))
        counts = {"state": state, "done": 2, "remaining": 1, "elapsed_s": 30, "eta_s": 40}
        assert counts.items() <= read_series(tmp_path).items()


def test_the_status_command_shows_the_series_and_the_run_in_hand(tmp_path, capsys):
    """As lines and as one JSON object; a complete series needs no run in hand."""

    def work(name):
        RunLog(tmp_path / name, "data", name).finish({}, stage="phase2", epoch=3, epochs=10)
        status.main(["--checkpoint_dir", str(tmp_path)])
        status.main(["--checkpoint_dir", str(tmp_path), "--json"])
        return {"seconds": 5.0}

    make_series(tmp_path, {"r7": {"size": 1, "folder": "r7"}}, work)
    out = capsys.readouterr().out
    assert (
        "Runs: 1, 0 done, 0 failed, 1 remaining | Elapsed: 0s | ETA: unknown (running)\n  r7: running\n"
        in out
    )
    assert "Run: r7 (complete)\nPhase: phase2\nEpoch: 3/10\n" in out
    fields = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
    assert fields["stage"] == "phase2" and fields["series"]["remaining"] == 1
    status.main(["--checkpoint_dir", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["series"]["state"] == "complete"
