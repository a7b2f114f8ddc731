"""Live tracking: TensorBoard gets the record's figures; a tracker that is absent or fails costs a line."""

import pytest
from accelerate.tracking import GeneralTracker

from config import ResidualConfig
from newllm.report.record import find_records, read_record
from newllm.training import account
from train import main as train


def test_tensorboard_has_what_the_record_has(tiny_settings):
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


class Flaky(GeneralTracker):
    """A tracker whose service goes away at the second row."""

    name, requires_logging_directory, main_process_only = "flaky", False, False
    tracker, calls = None, 0

    def store_init_configuration(self, values):
        pass

    def log(self, values, step, **options):
        self.calls += 1
        if self.calls == 2:
            raise ConnectionError("service gone")


@pytest.mark.parametrize(
    "trackers, reason",
    [([], "(ImportError: pip install wandb)"), ([Flaky()], "(ConnectionError: service gone)")],
    ids=["not installed", "failing"],
)
def test_a_tracker_that_fails_costs_a_line(tiny_settings, capsys, monkeypatch, trackers, reason):
    """No further calls of it, and the run ends as it would."""
    monkeypatch.setattr(account, "filter_trackers", lambda name, folder: trackers)
    train(ResidualConfig(**tiny_settings | dict(trackers="wandb")))
    text = capsys.readouterr().out
    assert text.count("warning: wandb") == 1 and f"warning: wandb failed {reason}" in text
    assert "\n---\n" in text and all(tracker.calls == 2 for tracker in trackers)
