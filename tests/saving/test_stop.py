"""Signals and time limits: saved, exited with a status of its own, and continued to the same bits."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import as_flags
from left_behind import same_weights

from config import ResidualConfig
from newllm.errors import exit_on_user_error
from newllm.phases import phase2
from newllm.report.record import read_status
from newllm.saving.files import load_sealed
from newllm.saving.stop import EXIT_STATUS, Interrupt, LeftBehind, Stopped, interruptible, poll, stop_reason
from scripts import status
from train import main

ROOT = Path(__file__).parents[2]


def start(settings):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "train.py", *as_flags(settings)]
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def ignored():
    """Signals that come when no run listens any more do no harm."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_stopped_by_signals_again_and_again_a_run_ends_with_the_same_bits(tiny_settings, ignored):
    """SIGTERM or SIGINT at random moments: every restart goes on exactly."""
    settings = tiny_settings | dict(
        phase1_max_iterations=30, phase2_epochs=15, patience=15, save_every_n_batches=50
    )
    whole = ResidualConfig(**settings)
    config = dataclasses.replace(whole, checkpoint_dir=settings["checkpoint_dir"] + "_signalled")
    began = time.monotonic()
    main(whole)
    moment = (time.monotonic() - began) / 4
    source, stops = random.Random(0), 0
    while True:
        number = source.choice((signal.SIGTERM, signal.SIGINT))
        timer = threading.Timer(source.uniform(0.2, 1.5) * moment, os.kill, (os.getpid(), number))
        timer.start()
        try:
            main(config)
            break
        except Stopped as stop:
            assert str(stop) == f"{number.name} received" and stop.goes_on
        finally:
            timer.cancel()
        stops += 1
        assert stops < 100
    assert stops >= 2 and same_weights(config, whole)


def test_a_stop_in_validation_saves_the_epoch_that_is_behind(after_phase_1, tmp_path, monkeypatch):
    """The signal comes while the epoch is evaluated: its batches are not lost, and the end is the same."""
    stopped = dataclasses.replace(after_phase_1, checkpoint_dir=str(tmp_path / "stopped"))
    shutil.copytree(after_phase_1.checkpoint_dir, stopped.checkpoint_dir)
    main(after_phase_1)
    real, calls = phase2.evaluate_prediction, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:  # the first is the quick one within the epoch
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            poll()
        return real(*arguments)

    monkeypatch.setattr(phase2, "evaluate_prediction", interrupted)
    with pytest.raises(Stopped, match="SIGTERM"):
        main(stopped)
    assert load_sealed(Path(stopped.checkpoint_dir) / "model_latest.pt")["stage_state"]["samples"] == 12
    main(stopped)
    assert same_weights(stopped, after_phase_1)


def test_a_second_signal_ends_the_process_at_once():
    """For the impatient: no more waiting for a safe point."""
    code = (
        "import os, signal\nfrom newllm.saving.stop import Interrupt\nwith Interrupt():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM and done.stdout == ""


def test_the_time_limit_stops_with_a_checkpoint(tiny_settings, monkeypatch):
    """max_minutes ends the run early and the next run goes on."""
    config = ResidualConfig(**tiny_settings, max_minutes=1e-6)
    with pytest.raises(Stopped, match="max_minutes"):
        main(config)
    done = main(ResidualConfig(**tiny_settings))
    assert done["phase1_steps"] == 9


def test_handlers_are_given_back():
    """After a run the process reacts to signals as before."""
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    assert stop_reason() is None


def test_status_tells_where_a_run_is_while_it_trains_and_after_it_was_cut_off(tiny_settings, capsys):
    """Phase, epoch, batch, progress, best loss, age of the checkpoint, speed and ETA; then killed."""
    settings = tiny_settings | dict(
        phase1_max_iterations=3000, phase1_convergence_threshold=1e-12
    )  # never converges
    process = start(settings)
    folder = settings["checkpoint_dir"]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (Path(folder) / "status.json").exists() and read_status(folder).get("stage") == "phase1":
            break
        assert process.poll() is None
        time.sleep(0.1)
    fields = read_status(folder)
    assert fields["state"] == "running" and fields["epochs"] == 3000 and fields["tok_per_s"] > 0
    assert fields["minutes_since_checkpoint"] < 1
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    status.main(["--checkpoint_dir", folder])
    out = capsys.readouterr().out
    for key in (
        "Phase: phase1",
        "Epoch: ",
        "/3000",
        "Batch: ",
        "Progress: ",
        "Best val loss: ",
        "Last checkpoint: ",
        "ETA: ",
    ):
        assert key in out
    assert "cut off" in out


def test_a_long_call_of_a_library_is_left_when_a_signal_comes():
    """Within a second; its result and its errors come through where none comes."""
    assert interruptible(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        interruptible(divmod, 7, 0)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    started = time.monotonic()
    with Interrupt(), pytest.raises(LeftBehind, match="SIGTERM"):
        interruptible(time.sleep, 30)
    assert time.monotonic() - started < 5


def test_preparing_a_long_text_stops_when_told(tmp_path):
    """One line, the status of an orderly stop, and no waiting for the library's call."""
    source = random.Random(0)
    text = "".join(chr(source.randrange(0x4E00, 0x9FFF)) for _ in range(300_000))
    with open(tmp_path / "long.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text[start:] + text}) + "\n" for start in range(12))
    settings = dict(
        data_source=tmp_path / "long.jsonl", tokenizer="bpe", vocab_size=60000, num_samples=8, val_samples=4
    )
    process = start(settings | dict(cache_dir=tmp_path / "k", checkpoint_dir=tmp_path / "c"))
    line = process.stdout.readline()  # of the progress
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    errors = process.communicate(timeout=60)[1]
    assert line.startswith("Progress: ") and "char/s" in line and time.monotonic() - asked < 10
    assert (
        process.returncode == EXIT_STATUS
        and errors.startswith("stopped: SIGINT received")
        and errors.count("\n") == 1
    )


@pytest.mark.parametrize(
    "saves, advice", [(True, "run the same command again to continue"), (False, "nothing was to be saved")]
)
def test_who_is_stopped_is_told_whether_the_same_command_continues(capsys, saves, advice):
    """A run that saves nothing would begin anew."""
    with pytest.raises(SystemExit) as end, exit_on_user_error(), Interrupt(1e-9, saves):
        poll()
    assert (
        end.value.code == EXIT_STATUS
        and capsys.readouterr().err == f"stopped: max_minutes is over; {advice}\n"
    )
