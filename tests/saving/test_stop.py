"""Signals and time limits: saved, exited with a status of its own, and continued to the same bits."""

import dataclasses
import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import kills
import pytest
from left_behind import same_weights

from config import ResidualConfig
from newllm import progress
from newllm.errors import exit_on_user_error
from newllm.phases import phase2
from newllm.saving.files import load_sealed
from newllm.saving.stop import EXIT_STATUS, Interrupt, LeftBehind, Stopped, interruptible, poll, stop_reason
from train import main


def test_stopped_by_signals_again_and_again_a_run_ends_with_the_same_bits(tiny_settings):
    """SIGTERM or SIGINT at random moments: every restart goes on exactly."""
    settings = tiny_settings | dict(phase1_max_iterations=10, phase2_epochs=6, save_every_n_batches=50)
    whole = ResidualConfig(**settings)
    config = dataclasses.replace(whole, checkpoint_dir=settings["checkpoint_dir"] + "_signalled")
    began = time.monotonic()
    main(whole)
    moment = (time.monotonic() - began) / 4
    source, stops, ended = random.Random(0), 0, False
    with Interrupt():  # hears a signal that comes when no run listens any more
        while not ended:
            number = source.choice((signal.SIGTERM, signal.SIGINT))
            timer = threading.Timer(source.uniform(0.4, 1.4) * moment, os.kill, (os.getpid(), number))
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
    source, output = random.Random(0), tmp_path / "output.txt"
    text = "".join(chr(source.randrange(0x4E00, 0x9FFF)) for _ in range(300_000))
    with open(tmp_path / "long.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text[start:] + text}) + "\n" for start in range(12))
    settings = dict(data_source=str(tmp_path / "long.jsonl"), tokenizer="bpe", vocab_size=60000)
    process = os.fork()
    if not process:
        progress.SECONDS_BETWEEN_LINES = 0.1
        kills._child(tmp_path, settings | dict(num_samples=8, val_samples=4), None)  # never back
    deadline = time.monotonic() + 60
    while not output.exists() or "char/s" not in output.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process, signal.SIGINT)
    asked = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status == EXIT_STATUS and time.monotonic() - asked < 10
    assert output.read_text().splitlines()[-1].startswith("stopped: SIGINT received")
