"""Saving in the background, what a state refers to, requests for a save, and room on the disk."""

import dataclasses
import itertools
import os
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from left_behind import same_weights

from config import ResidualConfig
from newllm.data.samples import load_data
from newllm.errors import UserError
from newllm.models.network import LanguageModel
from newllm.saving import checkpoint
from newllm.saving.checkpoint import Checkpointer
from newllm.saving.files import load_sealed, save_sealed
from newllm.saving.trained import frozen_path, tensors_digest
from newllm.training.runtime import open_runtime
from train import main


@pytest.fixture
def config(tiny_settings):
    return ResidualConfig(**tiny_settings, untrained_control=False)


def latest(config):
    return load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")


def elsewhere(config, name, **changes):
    return dataclasses.replace(config, checkpoint_dir=f"{config.checkpoint_dir}_{name}", **changes)


def on_save(monkeypatch, action):
    """Call `action(path)` before each file is written."""

    def save(value, path, *previous):
        action(path)
        return save_sealed(value, path, *previous)

    monkeypatch.setattr(checkpoint, "save_sealed", save)


def test_a_slow_disk_does_not_slow_training_and_changes_nothing(config, monkeypatch):
    """Epochs end while a save is under way: those saves are left out, and the run ends with the same bits."""
    config = dataclasses.replace(config, phase2_epochs=12, save_every_n_batches=10**6)
    expected = main(config)
    on_save(monkeypatch, lambda path: time.sleep(0.3))
    slow = elsewhere(config, "slow")
    summary = main(slow)
    assert same_weights(slow, config) and summary["val_loss"] == expected["val_loss"]
    assert latest(slow)["save_number"] < 12  # ends of epochs
    assert summary["saving_share_background"] > 0.1 and summary["saving_share"] > 0


def test_saves_by_batches_have_a_least_time_between_them(config, monkeypatch):
    """A fast device saves less often than its batches say; minutes and signals know no least time."""
    clock = [1000.0]
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    config = dataclasses.replace(config, save_every_n_batches=10, save_min_seconds=30, save_every_minutes=2)
    group = open_runtime(config).group
    with Checkpointer(config, "data", "run", group) as checkpointer:

        def due(batch, seconds):
            clock[0] = 1000.0 + seconds
            return checkpointer.due(batch)

        assert [due(10, 29), due(20, 30), due(21, 31)] == [False, True, False]
        assert due(33, 119) is False and due(33, 120) is True  # by time
        for name in ("save_requested", "stop_reason"):
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, name, lambda **_: "asked")
                assert due(1, 1)
        clock[0] = 1100.0
        checkpointer.save("now", LanguageModel(config, 50), {})
        assert [due(20, 110), due(30, 131)] == [False, True]  # since that save
    with Checkpointer(elsewhere(config, "without", save_min_seconds=0.0), "data", "run", group) as without:
        assert without.due(10) is True and without.due(11) is False


def test_what_is_saved_is_the_state_at_that_moment(config, monkeypatch):
    """Training goes on while the thread writes; the file holds no bit of that."""
    model, contexts = LanguageModel(config, 50), torch.zeros(3, 4)
    with Checkpointer(config, "data", "run", open_runtime(config).group) as checkpointer:
        before = {name: tensor.clone() for name, tensor in model.trained_state().items()}
        on_save(monkeypatch, lambda path: time.sleep(0.3))
        checkpointer.save("now", model, {"contexts": contexts, "history": [1]})
        with torch.no_grad():
            for tensor in [*model.parameters(), contexts]:
                tensor.add_(1)
    found = latest(config)
    assert all(torch.equal(before[name], tensor) for name, tensor in found["model_state_dict"].items())
    assert not found["stage_state"]["contexts"].any()


def test_a_stop_whose_state_cannot_be_written_says_so(config, monkeypatch):
    """Not "continue": the sentence names the reason, and what was written before is whole."""
    monkeypatch.setattr(checkpoint, "WAIT", 0.0)
    count = itertools.count(1)

    def full(path):
        if (number := next(count)) > 4:
            if number == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            raise OSError(28, "No space left on device")

    on_save(monkeypatch, full)
    with pytest.raises(UserError, match=r"SIGTERM received, but the state could not .*\(No space left"):
        main(config)
    assert latest(config)["save_number"] > 0


def test_frozen_tensors_are_stored_once_and_come_from_the_file(config, monkeypatch):
    """Also where a torch draws other numbers from the same seed; without the file the run is refused."""
    config = dataclasses.replace(config, freeze_context=True)
    expected = main(config)["val_loss"]
    moved = elsewhere(config, "moved")
    main(dataclasses.replace(moved, phase="1"))
    folder = Path(moved.checkpoint_dir)
    (frozen,) = folder.glob("model_frozen_*.pt")
    digest = tensors_digest(load_sealed(frozen))
    assert set(load_sealed(frozen)) == {"context_embedding"} and frozen == frozen_path(folder, digest)
    states = [load_sealed(path) for path in folder.glob("model_*.pt") if path != frozen]
    assert len(states) >= 5 and all(state["frozen"] == digest for state in states)
    assert not any("context_embedding" in state["model_state_dict"] for state in states)
    real = LanguageModel.__init__

    def drawn_differently(self, *arguments):
        real(self, *arguments)
        self.context_embedding.add_(0.5)

    monkeypatch.setattr(LanguageModel, "__init__", drawn_differently)
    aside = frozen.rename(frozen.with_suffix(".aside"))
    before = (folder / "model_latest.pt").read_bytes()
    with pytest.raises(UserError, match=f"frozen embeddings cannot be read.*{frozen.name}"):
        main(moved)
    assert (folder / "model_latest.pt").read_bytes() == before
    aside.rename(frozen)
    assert main(moved)["val_loss"] == expected


@pytest.mark.parametrize("kept", ["model_epoch.pt", "model_phase1.pt", "model_step_*.pt"])
def test_files_of_epochs_phases_and_steps_continue_a_run(config, kept):
    """All else lost, each of them leads to the same end."""
    main(config)
    expected, folder = elsewhere(config, "whole"), Path(config.checkpoint_dir)
    shutil.copytree(folder, expected.checkpoint_dir)
    for path in folder.glob("model_*.pt"):
        if not any(path.match(name) for name in (kept, "model_frozen_*", "*best.pt")):
            path.unlink()
    main(config)
    assert same_weights(config, expected)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_a_request_saves_now_and_training_goes_on(config, monkeypatch):
    """`kill -USR1`: model_backup.pt holds the state of the next batch; the run is not disturbed."""
    config = dataclasses.replace(config, save_every_n_batches=10**6)
    expected, asked = main(config), elsewhere(config, "asked")
    real, batches = Checkpointer.due, itertools.count(1)

    def due(self, steps):
        if next(batches) == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, steps)

    monkeypatch.setattr(Checkpointer, "due", due)
    assert main(asked)["val_loss"] == expected["val_loss"]
    backup = load_sealed(Path(asked.checkpoint_dir) / "model_backup.pt")
    assert backup["epoch"] == "phase1_iteration_2" and backup["stage_state"]["steps"] == 5
    assert not (Path(config.checkpoint_dir) / "model_backup.pt").exists()


def test_a_disk_without_room_is_refused_before_the_run_begins(config, monkeypatch):
    """The sentence has both figures; what is asked for bounds five times the largest state, closely."""
    config = dataclasses.replace(config, context_dim=64, embed_dim=64, num_layers=2)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"0\.00 GB free and the checkpoints of this run need about 0\.0. GB"):
        main(config)
    assert not (Path(config.checkpoint_dir) / "model_latest.pt").exists()
    main(dataclasses.replace(config, save_checkpoint=False))
    monkeypatch.undo()
    main(config)
    largest = max(path.stat().st_size for path in Path(config.checkpoint_dir).glob("model_*.pt"))
    model = LanguageModel(config, load_data(config).vocab_size)
    empty = Path(config.checkpoint_dir) / "empty"
    empty.mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 5 * (largest - 60_000)))
    with pytest.raises(UserError, match="GB more"):
        checkpoint.require_space(empty, model, config, torch.float32)
    checkpoint.require_space(Path(config.checkpoint_dir), model, config, torch.float32)  # they are there
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 10 * largest))
    checkpoint.require_space(empty, model, config, torch.float32)
