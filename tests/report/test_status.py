"""Status and report say where a run is: training, cut off, stopped, complete, repeated, beside others."""

import json
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import train
from config import ResidualConfig
from newllm.errors import UserError
from newllm.report.record import (
    RunLog,
    StatusFile,
    find_records,
    read_record,
    read_rows,
    read_status,
    remaining,
    status_lines,
    this_process,
)
from newllm.saving.stop import Stopped
from scripts import export, report, status

RUN = "20260101_000000"
CUT_OFF = "cut off; the same command continues it"
GONE = 2**22 + 1  # no process has this number


def lines_of(folder, capsys):
    """What scripts.status prints, as {key: value}."""
    capsys.readouterr()
    status.main(["--checkpoint_dir", str(folder)])
    return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())


def reported(folder, capsys, *arguments):
    capsys.readouterr()
    report.main(["--checkpoint_dir", str(folder), *arguments])
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def settings(tmp_path_factory, corpus_file):
    """Of a run of a second or two."""
    root = tmp_path_factory.mktemp("status")
    return dict(
        data_source=str(corpus_file), tokenizer="bpe", vocab_size=300, num_samples=12, val_samples=6,
        max_seq_length=24, context_dim=16, embed_dim=16, num_layers=1, phase1_max_iterations=3,
        phase1_batch_size=4, phase2_epochs=3, phase2_batch_size=4, min_batches=3,
        precision="fp32", device="cpu", cache_dir=str(root / "cache"),
        checkpoint_dir=str(root / "checkpoints"), artifacts=False,
    )  # fmt: skip


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def cut_off(settings):
    """(folder, bytes of its status file) of a run that ended in Phase 1 without a word, as if killed."""
    folder = Path(settings["checkpoint_dir"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "new_run_id", lambda: RUN)
        patch.setattr(RunLog, "__exit__", lambda *_: None)
        log = RunLog.log

        def killed(self, stage, **values):
            log(self, stage, **values)
            if stage == "phase1" and values["iteration"] == 2:
                settings["seen"] = read_status(folder)["state"]
                raise Killed

        patch.setattr(RunLog, "log", killed)
        with pytest.raises(Killed):
            train.main(ResidualConfig(**settings))
    assert settings.pop("seen") == "running"
    path = folder / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": GONE}))
    return folder, path.read_bytes()


def test_a_run_cut_off_is_reported_as_far_as_it_came(cut_off, capsys):
    """What is done of each phase and how fast, what is left; total = done + remaining; where it goes on."""
    folder, _ = cut_off
    found = lines_of(folder, capsys)
    assert (found["Run"], found["Phase"]) == (f"{RUN} ({CUT_OFF})", "phase1")
    assert found["A restart goes on"] == json.loads((folder / "manifest.json").read_text())["restart"]
    assert re.fullmatch(r"\d+ s for this phase, at most about \d+ s for all phases \(est.*\)", found["ETA"])
    text, speed = reported(folder, capsys), r"[\d.]+ s, [\d,]+ tok/s"
    for pattern in (
        rf"^RUN {RUN} \({CUT_OFF}\), begun 20",
        rf"untrained control: 3 of at most 3 epochs, 864 tokens, {speed}, best val loss \d",
        rf"Phase 1: 2 of at most 3 iterations, 576 tokens, {speed}\n",
        r"Phase 2: not begun, about \d+ s \(estimate\)",
        r"progress: 1,440 of at most 2,592 tokens of all phases \(55.6%\)",
        "Complete runs: none",
    ):
        assert re.search(pattern, text), pattern
    done, left, total = (
        float(re.search(rf"  {name}: ([\d.]+) s", text)[1]) for name in ("done", "remaining", "total")
    )
    assert total == pytest.approx(done + left, abs=0.11) and left > 0
    assert reported(folder, capsys, RUN).startswith(f"RUN {RUN}")
    with pytest.raises(UserError, match=rf"no run has been completed in .* command goes on with run {RUN}"):
        export.main(["--checkpoint_dir", str(folder)])


def test_a_run_that_saves_nothing_leaves_the_runs_status_alone(cut_off, settings, capsys):
    """It does not own the folder: the cut-off run is still the one that status and report show."""
    folder, before = cut_off
    train.main(ResidualConfig(**settings, save_checkpoint=False, load_checkpoint=False))
    assert (folder / "status.json").read_bytes() == before
    for path in find_records(folder):
        if path.stem != f"metrics_{RUN}":
            path.unlink()
    assert reported(folder, capsys).startswith(f"RUN {RUN} (cut off")


def test_folders_of_runs_below_are_named(cut_off, tmp_path, capsys):
    """Where nothing else is, as in the folder of a comparison that keeps its models."""
    alone = shutil.copytree(cut_off[0], tmp_path / "gru-12-0")
    assert lines_of(alone, capsys)["Run"].startswith(RUN)
    for command in (report, status):
        with pytest.raises(UserError, match=rf"no run has begun in .*by --checkpoint_dir: {alone}\."):
            command.main(["--checkpoint_dir", str(tmp_path)])


def test_a_finished_run_stays_finished(cut_off, settings, capsys):
    """Continued to its end, once more, and where checkpoints alone came: complete, the last loss."""
    folder, _ = cut_off
    summary = train.main(ResidualConfig(**settings))
    for lost in (False, False, True):
        if lost:
            (folder / "status.json").unlink()  # as on another machine
        repeated = train.main(ResidualConfig(**settings))
        assert all(repeated[name] == summary[name] for name in ("run_id", "date", "device"))
        found = lines_of(folder, capsys)
        assert (found["Run"], found["Phase"], found["Epoch"]) == (f"{RUN} (complete)", "phase2", "3/3")
        assert found["Progress"] == "100.0%" and "ETA" not in found
        assert found["Best val loss"] == f"{summary['val_loss']:.4f}"
        assert re.fullmatch(r"[\d.]+ minutes ago", found["Last checkpoint"])
    record = read_record(find_records(folder)[0])
    assert summary["val_loss"] == min(record.phase2["val_loss"]) and record.sessions == 5
    assert sum(record.times["parts"].values()) == pytest.approx(record.times["seconds"], rel=0.02)


@pytest.mark.parametrize("error", [Stopped("time is over"), UserError("nan"), ValueError("a\nb")], ids=repr)
def test_a_run_that_ended_early_is_no_running_run(tmp_path, error):
    """In a notebook the process lives on after the end of a run: the reason stands in the status."""
    for owns, goes_on in ((True, "continues it"), (False, "begins anew")):
        with pytest.raises(type(error)), RunLog(tmp_path, "data", "r", owns=lambda owns=owns: owns):
            raise error
        reason = str(error).replace("\n", " ")
        assert read_status(tmp_path)["state"] == f"stopped: {reason}; the same command {goes_on}"


def test_a_process_without_the_folder_does_not_write_over_a_live_run(tmp_path):
    """The file of a live process, or of a run with checkpoints, stays; of one gone without any it is not."""
    with pytest.raises(UserError, match="no run has begun"):
        read_status(tmp_path)
    owner = StatusFile(tmp_path, run_id="a")
    owner.update(now=True, stage="phase1")
    written = json.loads(owner.path.read_text())
    guest = StatusFile(tmp_path, owns=lambda: False, run_id="b")
    parent = {"pid": os.getppid(), "started": psutil.Process(os.getppid()).create_time()}
    for fields, saved, run in ((parent, False, "a"), ({"pid": GONE}, True, "a"), ({"pid": GONE}, False, "b")):
        owner.path.write_text(json.dumps(written | fields))
        (tmp_path / "model_latest.pt").unlink(missing_ok=True)
        if saved:
            (tmp_path / "model_latest.pt").touch()
        guest.update(now=True, stage="phase2")
        assert read_status(tmp_path)["run_id"] == run


def test_a_number_used_again_is_not_the_process_that_wrote(tmp_path):
    """Another process has the number of a run that was killed, as after a restart of the machine."""
    file = StatusFile(tmp_path, run_id="a")
    file.update(now=True)
    fields = json.loads(file.path.read_text())
    assert read_status(tmp_path)["state"] == "running" and fields["started"] == this_process()["started"]
    file.path.write_text(json.dumps(fields | {"started": fields["started"] - 100}))
    assert read_status(tmp_path)["state"] == "cut off before anything was saved; the same command begins anew"
    file.path.write_text(json.dumps(fields | {"host": "elsewhere", "updated_at": time.time() - 3600}))
    silence = "no word from elsewhere for 60 minutes; if it is gone: cut off"
    assert read_status(tmp_path)["state"].startswith(silence)


@pytest.mark.parametrize("content", ["[]", "{", "{}"])
def test_a_damaged_status_file_is_a_sentence(tmp_path, content):
    """Never a traceback; the report goes on without it."""
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(UserError, match=r"status\.json cannot be read: move it away"):
        read_status(tmp_path)


def test_what_is_left_is_estimated_by_the_work_of_each_stage():
    """Half of a phase at 10 tok/s, and a later one with three times the work a token."""
    plan = {"phase1": {"tokens": 200, "work": 2}, "phase2": {"tokens": 100, "work": 6}}
    assert remaining(plan, "phase1", 100, 10.0) == {"phase1": 10.0, "phase2": 30.0}
    assert remaining(plan, "phase2", 100, 10.0) == {"phase2": 0.0}
    assert remaining(plan, "phase1", 0, 0.0) == remaining({}, "phase1", 0, 9.0) == {}


def test_rows_hold_the_mean_load_of_the_gpu(tmp_path):
    """Of the moments since the row before, one at least; status shows the last; none without a GPU."""
    loads = iter((80.0, 60.0, 30.0))
    log = RunLog(tmp_path, "data", "r", gauge=lambda: next(loads))
    for done in (3, 6):
        log._status.written = float("-inf")
        log.status(SimpleNamespace(total=9, done=done, speed=1.0), stage="phase1", step=343)
    log.log("phase1", iteration=1)
    log.log("phase1", iteration=2)
    text = status_lines(read_status(tmp_path))
    assert "Step: 343" in text and "GPU utilisation: 60%" in text and "Progress: 66.7% of this phase" in text
    RunLog(tmp_path, "data", "r").log("phase1", iteration=3)
    first, second, third = read_rows(log.path)
    assert (first["gpu_utilization"], second["gpu_utilization"]) == (70.0, 30.0)
    assert "gpu_utilization" not in third
