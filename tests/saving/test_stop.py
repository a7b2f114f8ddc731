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
from newllm.saving.files import load_sealed
from newllm.saving.stop import EXIT_STATUS, Interrupt, LeftBehind, Stopped, interruptible, poll, stop_reason
from train import main

ROOT = Path(__file__).parents[2]


def test_stopped_by_signals_again_and_again_a_run_ends_with_the_same_bits(tiny_settings):
    """SIGTERM or SIGINT at random moments: every restart goes on exactly."""
    settings = tiny_settings | dict(phase1_max_iterations=20, phase2_epochs=8, save_every_n_batches=50)
    whole = ResidualConfig(**settings)
    config = dataclasses.replace(whole, checkpoint_dir=settings["checkpoint_dir"] + "_signalled")
    began = time.monotonic()
    main(whole)
    moment = (time.monotonic() - began) / 3
    source, stops, ended = random.Random(0), 0, False
    with Interrupt():  # hears a signal that comes when no run listens any more
        while not ended:
            number = source.choice((signal.SIGTERM, signal.SIGINT))
            timer = threading.Timer(source.uniform(0.3, 1.5) * moment, os.kill, (os.getpid(), number))
            timer.start()
            try:
                main(config)
                ended = True
            except Stopped as stop:
                assert str(stop) == f"{number.name} received"
                stops += 1
            timer.cancel()
            timer.join()
    assert 2 <= stops < 100 and same_weights(config, whole)


def test_a_stop_in_validation_saves_the_epoch_that_is_behind(after_phase_1, tmp_path, monkeypatch):
    """The signal comes while the epoch is evaluated: its batches are not lost, and the end is the same."""
    stopped = dataclasses.replace(after_phase_1, checkpoint_dir=str(tmp_path / "stopped"))
    shutil.copytree(after_phase_1.checkpoint_dir, stopped.checkpoint_dir)
    main(after_phase_1)
    real, calls = phase2.evaluate_prediction, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:  # the first is the quick one within the epoch
            signal.raise_signal(signal.SIGTERM)
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
    child = os.fork()
    if not child:
        with Interrupt():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM


def test_the_time_limit_stops_with_a_checkpoint(tiny_settings):
    """max_minutes ends the run early and the next run goes on."""
    with pytest.raises(Stopped, match="max_minutes"):
        main(ResidualConfig(**tiny_settings, max_minutes=1e-6))
    assert main(ResidualConfig(**tiny_settings))["phase1_steps"] == 9


def test_a_command_that_is_stopped_says_so_and_gives_the_handlers_back(capsys):
    """A line, a status of its own; afterwards the process reacts to signals as before."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, exit_on_user_error(), Interrupt(1e-9):
        assert signal.getsignal(signal.SIGTERM) != before
        poll()
    assert signal.getsignal(signal.SIGTERM) == before and stop_reason() is None
    line = "stopped: max_minutes is over; run the same command again, it goes on from what is saved\n"
    assert end.value.code == EXIT_STATUS and capsys.readouterr().err == line


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
    folders = dict(cache_dir=tmp_path / "k", checkpoint_dir=tmp_path / "c")
    settings = dict(data_source=tmp_path / "long.jsonl", tokenizer="bpe", vocab_size=60000, num_samples=8)
    arguments = [sys.executable, "train.py", *as_flags(settings | folders | dict(val_samples=4))]
    piped = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(arguments, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, **piped)
    line = process.stdout.readline()  # of the progress
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    errors = process.communicate(timeout=60)[1]
    assert line.startswith("Progress: ") and "char/s" in line and time.monotonic() - asked < 10
    assert process.returncode == EXIT_STATUS
    assert errors.startswith("stopped: SIGINT received") and errors.count("\n") == 1
