"""The record of a run: any JSON reader takes it, the console shows a view of it, and no disk ends a run through it."""

import builtins
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from newllm.report.runlog import RunLog, format_value, new_run_id, read_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def log(tmp_path):
    return RunLog(tmp_path, "chitchat", "20260101_000000")


def rows(log):
    """Rows of the file, by a reader that knows no NaN."""

    def refuse(constant):
        raise ValueError(constant)

    return [json.loads(line, parse_constant=refuse) for line in log.path.read_text().splitlines()]


def test_the_file_lies_by_data_source_and_run(tmp_path, log):
    """<checkpoint_dir>/<dataset>/logs/metrics_{run}.jsonl."""
    log.log("phase1")
    assert log.path == tmp_path / "chitchat" / "logs" / "metrics_20260101_000000.jsonl"
    assert log.path.exists()


def test_a_row_is_one_line_of_json(log):
    """With time and stage before the values, in the order they were logged."""
    log.log("phase1", iteration=1, cvfp=0.25, converged=0.5, name="a\nb")
    log.log("phase2", epoch=1, val_loss=5.5)
    first, second = rows(log)
    assert list(first) == ["time", "stage", "iteration", "cvfp", "converged", "name"]
    assert (first["stage"], first["iteration"], first["cvfp"], first["name"]) == ("phase1", 1, 0.25, "a\nb")
    assert (second["stage"], second["epoch"], second["val_loss"]) == ("phase2", 1, 5.5)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first["time"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_becomes_null(log, value):
    """At any depth; JSON has no NaN."""
    log.log("phase1", loss=value, curve=[1.0, value], nested={"a": {1: (value, 2)}})
    (row,) = rows(log)
    assert (row["loss"], row["curve"], row["nested"]) == (None, [1.0, None], {"a": {"1": [None, 2]}})


def test_values_keep_their_type_and_precision(log):
    """Integers, truth values, absence and floats to the last bit."""
    log.log("summary", steps=10**12, done=True, best=None, loss=0.1 + 0.2)
    (row,) = rows(log)
    assert row["steps"] == 10**12 and row["done"] is True and row["best"] is None and row["loss"] == 0.1 + 0.2


def test_a_continued_run_appends_to_its_file(tmp_path, log):
    """The same run id opens the same record."""
    log.log("phase1", iteration=1)
    RunLog(tmp_path, "chitchat", log.run_id).log("phase1", iteration=2)
    assert [row["iteration"] for row in rows(log)] == [1, 2]


def test_two_runs_have_two_files(tmp_path, log):
    """Another run id is another record."""
    log.log("phase1", iteration=1)
    other = RunLog(tmp_path, "chitchat", "20260101_000001")
    other.log("phase1", iteration=2)
    assert [row["iteration"] for row in rows(log)] == [1]


def iterations(path):
    return [row["iteration"] for row in read_rows(path)]


@pytest.mark.parametrize("error", [28, 30, 5, 2], ids=os.strerror)
def test_a_disk_that_refuses_costs_rows_and_not_the_run(log, monkeypatch, capsys, error):
    """Full, read-only, failing, gone: said once in one line, and rows are written again when it allows."""
    log.log("phase1", iteration=1)
    real = builtins.open

    def refuse(path, mode="r", *args, **kwargs):
        if str(path) == str(log.path) and mode != "rb":
            raise OSError(error, os.strerror(error))
        return real(path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", refuse)
        for iteration in (2, 3):
            log.log("phase1", iteration=iteration)
    log.log("phase1", iteration=4)
    (line,) = capsys.readouterr().out.splitlines()
    reason = os.strerror(error)
    assert line == f"warning: {log.path} cannot be written ({reason}); training goes on, its record has a gap"
    assert iterations(log.path) == [1, 4]


def test_a_disk_that_fills_up_within_a_row_corrupts_no_other(log, capsys):
    """The kernel itself takes the first bytes of a row and refuses the rest."""
    log.log("phase1", iteration=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 20, hard))
    try:
        for iteration in (2, 3):
            log.log("phase1", iteration=iteration)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.log("phase1", iteration=4)
    assert capsys.readouterr().out.count("cannot be written (File too large)") == 1
    assert iterations(log.path) == [1, 4]
    assert len(log.path.read_bytes().splitlines()) == 3  # one of them is what was left of the second row


def test_a_torn_last_line_is_skipped_and_the_next_row_has_a_line_of_its_own(tmp_path, log):
    """Cut after any byte, as by a lost machine: every row but the torn one is read, before and after the run goes on."""
    for iteration in (1, 2):
        log.log("phase1", iteration=iteration, name="\u00e4\n")
    whole = log.path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole) + 1):
        log.path.write_bytes(whole[:cut])
        kept = [1, 2] if cut >= len(whole) - 1 else [1]
        assert iterations(log.path) == kept
        RunLog(tmp_path, "chitchat", log.run_id).log("phase1", iteration=3)
        assert iterations(log.path) == [*kept, 3]


def test_bytes_that_are_no_text_are_skipped(log):
    """What a file system makes of a block that was never written: zeros, or anything."""
    log.log("phase1", iteration=1)
    with open(log.path, "ab") as file:
        file.write(b"\0" * 50 + b"\xff\xfe{")
    log.log("phase1", iteration=2)
    assert iterations(log.path) == [1, 2]


WRITE_ROWS = """
import sys
from newllm.report.runlog import RunLog

log = RunLog(sys.argv[1], "chitchat", "r")
for iteration in range(10**9):
    log.log("phase1", iteration=iteration, text="x" * 5000)
"""


def test_a_killed_process_leaves_rows_that_can_be_read(tmp_path):
    """SIGKILL while rows are written: the next process appends, and nothing but a torn line is lost."""
    path = tmp_path / "chitchat" / "logs" / "metrics_r.jsonl"
    process = subprocess.Popen([sys.executable, "-c", WRITE_ROWS, str(tmp_path)], cwd=ROOT)
    while not path.exists() or path.stat().st_size < 10**6:
        assert process.poll() is None
    process.kill()
    assert process.wait() == -signal.SIGKILL
    lines = len(path.read_bytes().splitlines())
    RunLog(tmp_path, "chitchat", "r").log("phase1", iteration="next")
    *before, last = iterations(path)
    assert last == "next" and before == list(range(len(before))) and len(before) >= lines - 1


def test_finish_prints_the_block(log, capsys):
    """`---`, then one `key: value` line each, in the order of the summary."""
    log.finish({"val_loss": 5.123456789, "steps": 120, "source": "chitchat", "passed": True, "horizon": None})
    assert capsys.readouterr().out == (
        "---\nval_loss: 5.12346\nsteps: 120\nsource: chitchat\npassed: True\nhorizon: None\n"
    )


def test_finish_shows_a_nan_that_the_record_holds_as_null(log, capsys):
    """The person reads what happened; the file stays JSON."""
    log.log("summary", val_loss=math.nan)
    log.finish({"val_loss": math.nan})
    assert "val_loss: nan" in capsys.readouterr().out
    assert rows(log)[0]["val_loss"] is None


def test_say_prints_a_line(capsys, log):
    """And an empty one without an argument."""
    log.say("hello")
    log.say()
    assert capsys.readouterr().out == "hello\n\n"


def test_floats_have_six_significant_digits():
    """Large and small alike; everything else is printed as it is."""
    assert [format_value(v) for v in (1 / 3, 123456.789, 1e-9, 2.0, 7)] == [
        "0.333333",
        "123457",
        "1e-09",
        "2",
        "7",
    ]


def test_a_run_id_is_a_moment():
    """YYYYmmdd_HHMMSS, so that file names sort by time."""
    assert re.fullmatch(r"20\d{6}_\d{6}", new_run_id())
