"""Status and report say where a run is: training, cut off, stopped, complete, repeated, beside others."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from config import ResidualConfig
from newllm.errors import UserError
from newllm.report.record import (
    RunLog,
    find_records,
    read_record,
    read_rows,
    read_status,
    seconds_left,
    status_lines,
)
from scripts import export, status

RUN = "20260101_000000"
CUT_OFF = "cut off; the same command continues it"
GONE = 2**22 + 1  # no process has this number


def lines_of(folder, capsys):
    """What scripts.status prints, as {key: value}."""
    capsys.readouterr()
    status.main(["--checkpoint_dir", str(folder)])
    return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())


@pytest.fixture(scope="module")
def cut_off(settings):
    """Folder of a run that ended in Phase 1 without a word, as if killed."""
    folder = Path(settings["checkpoint_dir"])
    log = RunLog.log

    def killed(self, stage, **values):
        log(self, stage, **values)
        if stage == "phase1" and values["iteration"] == 2:
            assert read_status(folder)["state"] == "running"
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "new_run_id", lambda: RUN)
        patch.setattr(RunLog, "__exit__", lambda *_: None)
        patch.setattr(RunLog, "log", killed)
        train.main(ResidualConfig(**settings, artifacts=False))
    path = folder / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": GONE}))
    return folder


def test_a_run_cut_off_is_reported_as_far_as_it_came(cut_off, reported, capsys):
    """What is done of each phase and how fast, what is left; total = done + remaining; where it goes on."""
    found = lines_of(cut_off, capsys)
    assert (found["Run"], found["Phase"]) == (f"{RUN} ({CUT_OFF})", "phase1")
    assert found["A restart goes on"] == json.loads((cut_off / "manifest.json").read_text())["restart"]
    assert re.fullmatch(r"at most about \d+ s for all phases, by the speed of this one", found["ETA"])
    text, speed = reported(cut_off), r"[\d.]+ s, [\d,]+ tok/s\n"
    for pattern in (
        rf"^SPEED ANALYSIS of run {RUN} \({CUT_OFF}\), context\n",
        rf"untrained control: 3 of at most 3 epochs, 864 tokens, {speed}",
        rf"Phase 1: 2 of at most 3 iterations, 576 tokens, {speed}",
        r"Phase 2: not begun\n",
        r"progress: 1,440 of at most 2,592 tokens of all phases \(55.6%\)",
        "Complete runs: none",
    ):
        assert re.search(pattern, text), pattern
    done, left, total = (
        float(re.search(rf"  {name}: ([\d.]+) s", text)[1]) for name in ("done", "remaining", "total")
    )
    assert total == pytest.approx(done + left, abs=0.11) and left > 0
    assert reported(cut_off, RUN).startswith(f"SPEED ANALYSIS of run {RUN}")
    sentence = rf"no run has been completed in .* command continues {RUN}"
    with pytest.raises(UserError, match=sentence):
        export.main(["--checkpoint_dir", str(cut_off)])
    with pytest.raises(UserError, match=sentence):
        reported(cut_off, RUN, RUN)


def test_a_run_that_saves_nothing_leaves_the_runs_status_alone(cut_off, settings):
    """It does not own the folder: the cut-off run is still the one that status shows."""
    before = (cut_off / "status.json").read_bytes()
    train.main(ResidualConfig(**settings, artifacts=False, save_checkpoint=False, load_checkpoint=False))
    assert (cut_off / "status.json").read_bytes() == before


def test_a_finished_run_stays_finished(cut_off, settings, capsys):
    """Continued to its end, once more, and where checkpoints alone came: complete, the last loss."""
    config = ResidualConfig(**settings, artifacts=False)
    summary = train.main(config)
    for lost in (False, True):
        if lost:
            (cut_off / "status.json").unlink()  # as on another machine
        repeated = train.main(config)
        assert all(repeated[name] == summary[name] for name in ("run_id", "date", "device"))
        found = lines_of(cut_off, capsys)
        assert (found["Run"], found["Phase"], found["Epoch"]) == (f"{RUN} (complete)", "phase2", "3/3")
        assert found["Progress"] == "100.0%" and "ETA" not in found
        assert found["Best val loss"] == f"{summary['val_loss']:.4f}"
        assert re.fullmatch(r"[\d.]+ minutes ago", found["Last checkpoint"])
    record = read_record(find_records(cut_off)[0])
    assert summary["val_loss"] == min(record.phase2["val_loss"]) and record.sessions == 4
    assert sum(record.times["parts"].values()) == pytest.approx(record.times["seconds"], rel=0.02)


def test_a_run_that_ended_early_is_no_running_run(tmp_path):
    """In a notebook the process lives on after the end of a run: the reason stands in the status."""
    with pytest.raises(ValueError), RunLog(tmp_path, "data", "r"):
        raise ValueError("a\nb")
    assert read_status(tmp_path)["state"] == "stopped: a b"


def test_a_number_used_again_is_not_the_process_that_wrote(tmp_path):
    """Another process has the number of a run that was killed, as after a restart of the machine."""
    with pytest.raises(UserError, match="no run has begun"):
        read_status(tmp_path)
    RunLog(tmp_path, "data", "r").log("start", plan={})
    path = tmp_path / "status.json"
    fields = json.loads(path.read_text())
    assert read_status(tmp_path)["state"] == "running"
    path.write_text(json.dumps(fields | {"started": fields["started"] - 100}))
    assert read_status(tmp_path)["state"] == CUT_OFF
    path.write_text(json.dumps(fields | {"host": "elsewhere", "updated_at": fields["updated_at"] - 3600}))
    assert "Last word: 60.0 minutes ago, from elsewhere" in status_lines(read_status(tmp_path))


def test_what_is_left_is_estimated_by_the_work_of_each_stage():
    """Half of a phase at 10 tok/s, and a later one with three times the work a token."""
    plan = {"phase1": {"tokens": 200, "work": 2}, "phase2": {"tokens": 100, "work": 6}}
    assert seconds_left(plan, "phase1", 100, 10.0) == 10 + 30
    assert seconds_left(plan, "phase2", 100, 10.0) == 0
    assert seconds_left(plan, "phase1", 0, 0.0) is seconds_left({}, "phase1", 0, 9.0) is None


def test_rows_hold_the_load_of_the_gpu(tmp_path):
    """As it was when the status was written last; none without a GPU."""
    for load in (60.0, None):
        log = RunLog(tmp_path, "data", f"r{load}", gauge=lambda load=load: load)
        log.status(SimpleNamespace(total=9, done=6, speed=1.0), stage="phase1", step=343)
        log.log("phase1", iteration=1)
        text = status_lines(read_status(tmp_path))
        assert "Step: 343" in text and "Progress: 66.7% of this phase" in text
        assert ("GPU utilisation: 60%" in text) == (load is not None)
        (row,) = read_rows(log.path)
        assert row.get("gpu_utilization") == load


def test_the_stage_without_passes_has_no_epoch_of_the_one_before(tmp_path, capsys):
    """Its name and what it does; what was saved and the best loss stay."""
    log = RunLog(tmp_path, "data", RUN)
    progress = SimpleNamespace(done=1, total=2, speed=3.0)
    log.status(progress, stage="phase2", epoch=3, epochs=10, batch=1, batches=5, best_val_loss=4.5)
    log.enter("retrieval")
    found = lines_of(tmp_path, capsys)
    assert found["Phase"] == "retrieval" and found["Best val loss"] == "4.5000"
    assert found["Progress"].startswith("all is trained")
    assert not {"Epoch", "Batch", "Speed", "ETA"} & found.keys()
    log.finish({}, stage="phase2", epoch=3, epochs=10)
    assert lines_of(tmp_path, capsys)["Progress"] == "100.0%"
