"""The record of a run: any JSON reader takes it, the console shows a view of it."""

import json
import math
import re

import pytest

from newllm.reporting.runlog import RunLog, format_value, new_run_id


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


def test_finish_prints_the_block_and_records_it(log, capsys):
    """`---`, then one `key: value` line each, in the order of the summary; the record has the same in full."""
    log.finish({"val_loss": 5.123456789, "steps": 120, "source": "chitchat", "passed": True, "horizon": None})
    assert capsys.readouterr().out == (
        "---\nval_loss: 5.12346\nsteps: 120\nsource: chitchat\npassed: True\nhorizon: None\n"
    )
    (row,) = rows(log)
    assert (row["stage"], row["val_loss"], row["steps"]) == ("summary", 5.123456789, 120)


def test_finish_shows_a_nan_that_the_record_holds_as_null(log, capsys):
    """The person reads what happened; the file stays JSON."""
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
    assert [format_value(v) for v in (1 / 3, 123456.789, 1e-9, 2.0, 7)] == ["0.333333", "123457", "1e-09", "2", "7"]


def test_a_run_id_is_a_moment():
    """YYYYmmdd_HHMMSS, so that file names sort by time."""
    assert re.fullmatch(r"20\d{6}_\d{6}", new_run_id())
