"""The record of a run: any JSON reader takes it, the console shows a view of it, no disk ends a run by it."""

import json
import math
import re
import resource

import pytest

from newllm.errors import UserError
from newllm.report.record import RunLog, as_curve, format_value, new_run_id, read_record, read_rows


@pytest.fixture
def log(tmp_path):
    return RunLog(tmp_path, "chitchat", "20260101_000000")


def rows(log):
    """Rows of the file, by a reader that knows no NaN."""

    def refuse(constant):
        raise ValueError(constant)

    return [json.loads(line, parse_constant=refuse) for line in log.path.read_text().splitlines()]


def iterations(path):
    return [row["iteration"] for row in read_rows(path)]


def test_a_row_is_one_line_of_json(tmp_path, log):
    """Time and stage first, values of any type to the last bit, NaN null; the same id continues a record."""
    kept = dict(steps=10**12, done=True, best=None, loss=0.1 + 0.2, name="a\nb")
    log.log("summary", **kept, curve=[1.0, math.nan], nested={"a": {1: (-math.inf, 2)}})
    RunLog(tmp_path, "chitchat", log.run_id).log("phase2", epoch=1)
    RunLog(tmp_path, "chitchat", "20260101_000001").log("phase1", iteration=2)
    assert log.path == tmp_path / "chitchat" / "logs" / "metrics_20260101_000000.jsonl"
    first, second = rows(log)
    assert list(first) == ["time", "stage", *kept, "curve", "nested"]
    assert {name: first[name] for name in kept} == kept and first["done"] is True
    assert (first["curve"], first["nested"]) == ([1.0, None], {"a": {"1": [None, 2]}})
    assert (second["stage"], second["epoch"]) == ("phase2", 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first["time"])
    assert re.fullmatch(r"20\d{6}_\d{6}", new_run_id())  # so that names sort by time


def test_a_disk_that_fills_up_within_a_row_costs_rows_and_neither_others_nor_the_run(log, capsys):
    """The kernel takes the first bytes of a row and refuses the rest: said once, and written again later."""
    log.log("phase1", iteration=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 20, hard))
    try:
        for iteration in (2, 3):
            log.log("phase1", iteration=iteration)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.log("phase1", iteration=4)
    refused = (
        f"warning: {log.path} cannot be written (File too large); training goes on, its record has a gap"
    )
    assert capsys.readouterr().out.splitlines() == [refused]
    assert iterations(log.path) == [1, 4]


def test_a_torn_last_line_is_skipped_and_the_next_row_has_a_line_of_its_own(tmp_path, log):
    """Cut after any byte, or followed by what is no text: every other row is read, before and after."""
    for iteration in (1, 2):
        log.log("phase1", iteration=iteration, name="\u00e4\n")
    whole = log.path.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole) + 1):
        log.path.write_bytes(whole[:cut])
        kept = [1, 2] if cut >= len(whole) - 1 else [1]
        RunLog(tmp_path, "chitchat", log.run_id).log("phase1", iteration=3)
        assert iterations(log.path) == [*kept, 3]
    log.path.write_bytes(whole + b"\0" * 50 + b"\xff\xfe{")  # a block never written
    log.log("phase1", iteration=3)
    assert iterations(log.path) == [1, 2, 3]


def test_finish_prints_the_block(log, capsys):
    """`---`, then one `key: value` line each; a NaN that the record holds as null is shown to the person."""
    log.finish({"val_loss": 5.123456789, "steps": 120, "source": "chitchat", "none": None, "bad": math.nan})
    assert capsys.readouterr().out == (
        "---\nval_loss: 5.12346\nsteps: 120\nsource: chitchat\nnone: None\nbad: nan\n"
    )
    shown = [format_value(value) for value in (1 / 3, 123456.789, 1e-9, 2.0, 7, True)]
    assert shown == ["0.333333", "123457", "1e-09", "2", "7", "True"]


def test_a_record_counts_an_epoch_done_twice_once(log):
    """A run killed after an epoch's row and before its save writes it again; settings are those in effect."""
    log.log("phase2", epoch=1)
    with pytest.raises(UserError, match="cannot be read as the record of a run"):
        read_record(log.path)
    about = {"plan": {}, "attention": "none"}
    for session, losses in enumerate(([5.0, 4.0], [3.9, 3.0])):
        log.log("start", config={"model_type": "gru", "seed": session}, device=f"d{session}", **about)
        for epoch, loss in enumerate(losses, 1 + session):
            log.log("phase2", epoch=epoch, train_loss=loss)
    log.log("start", config={"model_type": "gru", "seed": 9}, **about)  # of a session that trained nothing
    record = read_record(log.path)
    assert record.phase2["epoch"] == [1, 2, 3] and record.phase2["train_loss"] == [5.0, 3.9, 3.0]
    assert (record.sessions, record.run, record.kind) == (3, log.run_id, "gru")
    assert (record.config["seed"], record.start["device"]) == (1, "d0")


def test_curves_are_read_whatever_their_shape():
    """A list counts from 1; keys that JSON made text are numbers again."""
    assert as_curve([3, 4]) == {1.0: 3, 2.0: 4} and as_curve({"0": 5}) == {0.0: 5}
    assert as_curve([]) is as_curve(None) is None
