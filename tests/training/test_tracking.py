"""Live tracking: TensorBoard gets the record's figures; a tracker that is absent or fails costs a line."""

import pytest
from accelerate.tracking import GeneralTracker

from config import ResidualConfig
from newllm.report.record import find_records, read_record
from newllm.training import tracking
from train import main as train


def test_tensorboard_has_what_the_record_has(tiny_settings, tmp_path):
    """Losses of both phases by epoch, read back from the event files."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(ResidualConfig(**tiny_settings | dict(trackers="tensorboard")))
    record = read_record(find_records(tiny_settings["checkpoint_dir"])[0])
    events = EventAccumulator(str(record.folder / "tracking" / record.run / "newllm"))
    events.Reload()
    columns = {"phase1/cvfp": record.phase1["cvfp"], "phase2/val_loss": record.phase2["val_loss"]}
    for tag, column in columns.items():
        found = events.Scalars(tag)
        assert [event.step for event in found] == [1, 2, 3][: len(column)]
        assert [event.value for event in found] == pytest.approx(column, rel=1e-6)


def test_a_tracker_that_is_not_installed_costs_a_line(tiny_settings, capsys, monkeypatch):
    """And says how to get it."""
    monkeypatch.setattr(tracking, "filter_trackers", lambda name, folder: [])
    train(ResidualConfig(**tiny_settings | dict(trackers="wandb")))
    text = capsys.readouterr().out
    assert text.count("warning: wandb cannot begin") == 1 and "pip install wandb" in text
    assert "\n---\n" in text


def test_a_tracker_that_fails_later_is_left_out(tiny_settings, capsys, monkeypatch):
    """The service goes away at the second row: one line, no further calls, the run ends as it would."""
    calls = []

    class Flaky(GeneralTracker):
        name, requires_logging_directory, main_process_only = "flaky", False, False
        tracker = None

        def store_init_configuration(self, values):
            pass

        def log(self, values, step, **options):
            calls.append(values)
            if len(calls) == 2:
                raise ConnectionError("service gone")

    elsewhere = dict(checkpoint_dir=tiny_settings["checkpoint_dir"] + "_other")
    expected = train(ResidualConfig(**tiny_settings | elsewhere))
    capsys.readouterr()
    monkeypatch.setattr(tracking, "filter_trackers", lambda name, folder: [Flaky()])
    summary = train(ResidualConfig(**tiny_settings | dict(trackers="trackio")))
    text = capsys.readouterr().out
    assert len(calls) == 2 and text.count("warning: trackio failed (ConnectionError: service gone)") == 1
    assert summary["val_loss"] == expected["val_loss"]
