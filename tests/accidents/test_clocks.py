"""What a run makes of clocks that lie: the same bits."""

import dataclasses
import os
import time
from pathlib import Path

import pytest
from left_behind import same, weights

from config import ResidualConfig
from newllm.saving.files import load_sealed
from train import main


def test_files_with_shuffled_times_are_read_in_the_order_they_were_saved(tiny_settings):
    """As after a copy: with the latest damaged, the newest of the others by its stored number is continued, to the same bits."""
    whole = ResidualConfig(**tiny_settings)
    main(whole)
    config = dataclasses.replace(whole, checkpoint_dir=whole.checkpoint_dir + "_copied", phase="1")
    main(config)
    folder = Path(config.checkpoint_dir)
    (folder / "model_latest.pt").unlink()
    (folder / "model_latest.pt").write_bytes(b"damaged")
    numbers = {}
    for path in folder.glob("model_*.pt"):
        if path.name != "model_latest.pt" and "stage_state" in (found := load_sealed(path)):
            numbers[path] = found["save_number"]
    ages = sorted(numbers, key=numbers.get)  # the older the state, the younger the file
    for age, path in enumerate(ages):
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
        os.utime(path, (10**9 - 1000 * age,) * 2)
    main(dataclasses.replace(config, phase="both"))
    assert same(weights(config), weights(whole))


@pytest.mark.parametrize("hours", [-48, 48])
def test_a_clock_that_was_set_changes_no_result(after_phase_1, tiny_settings, monkeypatch, hours):
    """Two days back or forth between the sessions: the run goes on, and its seconds stay sensible."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600 * hours)
    summary = main(after_phase_1)
    assert 0 < summary["seconds"] < 600
    monkeypatch.setattr(time, "time", real)
    alone = dataclasses.replace(after_phase_1, checkpoint_dir=after_phase_1.checkpoint_dir + "_alone")
    assert main(alone)["val_loss"] == summary["val_loss"]
