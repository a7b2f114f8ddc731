"""Status and report say where a run is: while it trains, cut off, stopped, complete, repeated, and beside other commands."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import as_flags

import test as scale_check
import train
from config import ResidualConfig
from newllm.errors import UserError
from newllm.report.record import find_records, read_record
from newllm.report.runlog import RunLog, read_rows
from newllm.report.status import StatusFile, read_status, remaining, status_lines, this_process
from newllm.saving.stop import Stopped
from scripts import export, report, status

ROOT = Path(__file__).parents[2]


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
        data_source=str(corpus_file), tokenizer="bpe", vocab_size=300, num_samples=12, val_samples=6, max_seq_length=24,
        context_dim=16, embed_dim=16, num_layers=1, phase1_max_iterations=3, phase1_batch_size=4, phase2_epochs=3,
        phase2_batch_size=4, min_batches=3, precision="fp32", device="cpu", cache_dir=str(root / "cache"),
        checkpoint_dir=str(root / "checkpoints"), artifacts=False,
    )  # fmt: skip


class Killed(train.EpochLoop):
    """A loop that ends without a word behind the second row of Phase 1."""

    def _say(self, line):
        if line.startswith("phase 1 | iteration  2"):
            raise KeyboardInterrupt
        super()._say(line)


@pytest.fixture(scope="module")
def cut_off(settings):
    """(folder, bytes of its status file) of a run that ended in Phase 1 without a word, as one that was killed."""
    patch = pytest.MonkeyPatch()
    patch.setattr("train.new_run_id", lambda: "20260101_000000")
    patch.setattr(train, "EpochLoop", Killed)
    patch.setattr(train.RunLog, "__exit__", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        train.main(ResidualConfig(**settings))
    patch.undo()
    path = Path(settings["checkpoint_dir"]) / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": 2**22 + 1}))
    return path.parent, path.read_bytes()


def test_a_run_cut_off_is_reported_as_far_as_it_came(cut_off, capsys):
    """What is done of each phase and how fast, what is left of all phases; total = done + remaining; where it goes on."""
    folder, _ = cut_off
    found = lines_of(folder, capsys)
    assert (
        found["Run"] == "20260101_000000 (cut off; the same command continues it)"
        and found["Phase"] == "phase1"
    )
    saved = json.loads((folder / "manifest.json").read_text())
    assert found["A restart goes on"] == saved.get("restart", f"at {saved['epoch']}")
    assert re.fullmatch(
        r"\d+ s for this phase, at most about \d+ s for all phases \(estimate.*\)", found["ETA"]
    )
    text = reported(folder, capsys)
    assert "RUN 20260101_000000 (cut off; the same command continues it), begun 20" in text
    assert re.search(
        r"untrained control: 3 of at most 3 epochs, 864 tokens, [\d.]+ s, [\d,]+ tok/s, best val loss \d",
        text,
    )
    assert re.search(r"Phase 1: 2 of at most 3 iterations, 576 tokens, [\d.]+ s, [\d,]+ tok/s\n", text)
    assert re.search(r"Phase 2: not begun, about \d+ s \(estimate\)", text)
    assert "progress: 1,440 of at most 2,592 tokens of all phases (55.6%)" in text
    done, left, total = (
        float(re.search(rf"  {name}: ([\d.]+) s", text)[1]) for name in ("done", "remaining", "total")
    )
    assert total == pytest.approx(done + left, abs=0.11) and left > 0
    assert "Complete runs: none" in text
    assert reported(folder, capsys, "20260101_000000").startswith("RUN 20260101_000000")
    with pytest.raises(
        UserError, match=r"no run has been completed in .*: the same train.py command goes on with run 2026"
    ):
        export.main(["--checkpoint_dir", str(folder)])


def test_a_scale_check_leaves_the_runs_status_alone(cut_off, settings, capsys):
    """It writes to a folder of its own: the cut-off run is still the one that status and report show."""
    folder, before = cut_off
    scale_check.main(ResidualConfig(**settings))
    assert (folder / "status.json").read_bytes() == before
    assert reported(folder, capsys).startswith("RUN 20260101_000000 (cut off")
    assert lines_of(folder / "scale_check", capsys)["Run"].endswith(" (complete)")
    train.main(
        ResidualConfig(**settings, save_checkpoint=False, load_checkpoint=False)
    )  # does not own the folder either
    assert (folder / "status.json").read_bytes() == before


def test_a_finished_run_stays_finished(cut_off, settings, capsys):
    """Continued to its end, and the same command once more: complete, 100 %, the record's best loss, a checkpoint's age."""
    folder, _ = cut_off
    for path in set(find_records(folder)[1:]):
        path.unlink()  # of the run that saved nothing
    summary = train.main(ResidualConfig(**settings))
    (path,) = find_records(folder)
    record = read_record(path)
    best = min(record.phase2["val_loss"])
    for again in (False, True):
        if again:
            repeated = train.main(ResidualConfig(**settings))
            assert {k: repeated[k] for k in ("run_id", "date", "device")} == {
                k: summary[k] for k in ("run_id", "date", "device")
            }
        found = lines_of(folder, capsys)
        assert (
            found["Run"] == "20260101_000000 (complete)"
            and found["Phase"] == "phase2"
            and found["Epoch"] == "3/3"
        )
        assert (
            found["Progress"] == "100.0%"
            and found["Best val loss"] == f"{best:.4f}" == f"{summary['val_loss']:.4f}"
        )
        assert found["Last checkpoint"].endswith(" minutes ago") and "ETA" not in found
    (folder / "status.json").unlink()  # as on another machine, to which checkpoints alone came
    train.main(ResidualConfig(**settings))
    found = lines_of(folder, capsys)
    assert (found["Progress"], found["Epoch"], found["Best val loss"]) == ("100.0%", "3/3", f"{best:.4f}")
    assert "0.0 minutes ago" in found["Last checkpoint"] or float(found["Last checkpoint"].split()[0]) >= 0
    assert record.sessions == 2 and sum(record.times["parts"].values()) == pytest.approx(
        record.times["seconds"], rel=0.02
    )


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_last_validation_counts(tiny_settings, capsys, epochs):
    """The best loss of status is the run's, with one epoch too, whose only validation comes after all batches."""
    config = ResidualConfig(**tiny_settings | dict(phase2_epochs=epochs, untrained_control=False))
    summary = train.main(config)
    assert lines_of(config.checkpoint_dir, capsys)["Best val loss"] == f"{summary['val_loss']:.4f}"


@pytest.mark.parametrize(
    "error", [Stopped("max_minutes is over"), UserError("the loss is nan"), ValueError("a\nb")], ids=repr
)
def test_a_run_that_ended_early_is_no_running_run(tiny_settings, monkeypatch, error):
    """In a notebook the process lives on after the end of a run: the reason stands in the status."""
    config = ResidualConfig(**tiny_settings | dict(untrained_control=False))
    monkeypatch.setattr(train.Phase1, "begin", lambda self: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        train.main(config)
    reason = str(error).replace("\n", " ")
    assert read_status(config.checkpoint_dir)["state"] == f"stopped: {reason}; the same command continues it"


def test_report_names_the_folders_of_other_commands(tiny_settings):
    """Only a scale check lies there: a sentence that says so and which folder to give."""
    config = ResidualConfig(**tiny_settings | dict(phase2_epochs=1, phase1_max_iterations=1))
    scale_check.main(config)
    inner = Path(config.checkpoint_dir) / "scale_check"
    with pytest.raises(
        UserError, match=rf"holds no run of train.py.*give one of these by --checkpoint_dir: {inner}\."
    ):
        report.main(["--checkpoint_dir", config.checkpoint_dir])
    report.main(["--checkpoint_dir", str(inner)])
    with pytest.raises(
        UserError, match=rf"no run has begun in .*give one of these by --checkpoint_dir: {inner}\."
    ):
        status.main(["--checkpoint_dir", config.checkpoint_dir])


def test_a_running_run_is_reported_from_another_process(tiny_settings, capsys):
    """While it trains: running, with speed and what is left."""
    settings = tiny_settings | dict(
        phase1_max_iterations=3000, phase1_convergence_threshold=1e-12, untrained_control=False
    )
    command = [sys.executable, "train.py", *as_flags(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    folder, deadline = Path(settings["checkpoint_dir"]), time.monotonic() + 100
    try:
        while (
            not find_records(folder)
            or not read_record(find_records(folder)[0]).phase1
            or not status_has(folder, "tok_per_s")
        ):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        text = reported(folder, capsys)
        assert re.search(r"RUN \d+_\d+ \(running\)", text) and re.search(
            r"Phase 1: \d+ of at most 3000 iterations", text
        )
        assert re.search(r"  remaining: [\d.]+ s, at most and estimated", text)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def status_has(folder, field):
    return (folder / "status.json").exists() and field in read_status(folder)


def test_a_process_without_the_folder_does_not_write_over_a_live_run(tmp_path):
    """The file of a live process, or of a run with checkpoints, stays; that of one that has gone and saved nothing does not."""
    owner = StatusFile(tmp_path, run_id="a")
    owner.update(now=True, stage="phase1")
    written = json.loads(owner.path.read_text())
    parent = {"pid": os.getppid(), "started": None}
    owner.path.write_text(json.dumps(written | parent))
    guest = StatusFile(tmp_path, owns=lambda: False, run_id="b")
    guest.update(now=True, stage="phase2")
    assert read_status(tmp_path)["run_id"] == "a"
    owner.path.write_text(json.dumps(written | parent | {"pid": 2**22 + 1}))
    (tmp_path / "model_latest.pt").touch()
    guest.update(now=True)
    assert read_status(tmp_path)["run_id"] == "a"
    (tmp_path / "model_latest.pt").unlink()
    guest.update(now=True)
    assert read_status(tmp_path)["run_id"] == "b"


def test_a_number_used_again_is_not_the_process_that_wrote(tmp_path):
    """Another process has the number of a run that was killed, as after a restart of the machine: it is cut off."""
    file = StatusFile(tmp_path, run_id="a")
    file.update(now=True)
    fields = json.loads(file.path.read_text())
    assert read_status(tmp_path)["state"] == "running" and fields["started"] == this_process()["started"] > 0
    file.path.write_text(json.dumps(fields | {"started": fields["started"] - 1}))
    assert read_status(tmp_path)["state"].startswith("cut off")
    file.path.write_text(json.dumps(fields | {"host": "elsewhere", "updated_at": time.time() - 3600}))
    assert read_status(tmp_path)["state"].startswith(
        "no word from elsewhere for 60 minutes; if it is gone: cut off"
    )


@pytest.mark.parametrize("content", ["[]", "{", "{}"])
def test_a_damaged_status_file_is_a_sentence_or_nothing_known(tmp_path, content):
    """Never a traceback."""
    (tmp_path / "status.json").write_text(content)
    try:
        assert status_lines(read_status(tmp_path))[1] == "Phase: preparing"
    except UserError as error:
        assert "status.json cannot be read" in str(error)


def test_what_is_left_is_estimated_by_the_work_of_each_stage():
    """Half of a phase at 10 tok/s, and a later one with three times the work a token."""
    plan = {"phase1": {"tokens": 200, "work": 2}, "phase2": {"tokens": 100, "work": 6}}
    assert remaining(plan, "phase1", 100, 10.0) == {"phase1": 10.0, "phase2": 30.0}
    assert remaining(plan, "phase2", 100, 10.0) == {"phase2": 0.0}
    assert remaining(plan, "phase1", 0, 0.0) == remaining({}, "phase1", 0, 9.0) == {}


def test_rows_hold_the_mean_load_of_the_gpu(tmp_path):
    """Of the moments since the row before, one at least; without a GPU that tells, no such figure."""
    loads = iter((80.0, 60.0, 30.0))
    log = RunLog(tmp_path, "data", "r", gauge=lambda: next(loads))
    log._status.written = float("-inf")
    log.status(SimpleNamespace(total=9, done=3, speed=1.0), stage="phase1")
    log._status.written = float("-inf")
    log.status(SimpleNamespace(total=9, done=6, speed=1.0), stage="phase1")
    log.log("phase1", iteration=1)
    log.log("phase1", iteration=2)
    RunLog(tmp_path, "data", "r", gauge=lambda: None).log("phase1", iteration=3)
    assert [row.get("gpu_utilization") for row in read_rows(log.path)] == [70.0, 30.0, None]
    assert (
        "gpu_utilization" not in list(read_rows(log.path))[2]
        and read_status(tmp_path)["gpu_utilization"] == 60.0
    )


def test_the_global_step_and_the_gpu_are_shown(tmp_path):
    """Where the loop tells them."""
    StatusFile(tmp_path, run_id="a").update(now=True, stage="phase2", step=343, gpu_utilization=81.0)
    text = status_lines(read_status(tmp_path))
    assert "Step: 343" in text and "GPU utilisation: 81%" in text
