"""Saving in the background, what a state refers to, requests for a save, and what a run refuses to begin with."""

import dataclasses
import os
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from config import ResidualConfig
from newllm.data.samples import load_data
from newllm.errors import UserError
from newllm.models.network import LanguageModel
from newllm.saving import checkpoint
from newllm.saving.checkpoint import Checkpointer
from newllm.saving.files import load_sealed, save_sealed
from newllm.saving.trained import frozen_digest, frozen_path
from newllm.training.runtime import open_runtime
from train import main


def weights(folder):
    return load_sealed(Path(folder) / "model_latest.pt")["model_state_dict"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def elsewhere(config, name):
    return dataclasses.replace(config, checkpoint_dir=f"{config.checkpoint_dir}_{name}")


def on_save(monkeypatch, action):
    """Call `action(path)` before each file is written."""
    real = save_sealed

    def save(value, path, *previous):
        action(path)
        return real(value, path, *previous)

    monkeypatch.setattr(checkpoint, "save_sealed", save)


# In the background


def test_a_slow_disk_does_not_slow_training_and_changes_nothing(tiny_settings, monkeypatch):
    """Epochs end while a save is under way: those saves are left out, and the run ends on disk with the same bits."""
    config = ResidualConfig(
        **tiny_settings | dict(phase1_max_iterations=12, phase2_epochs=12, save_every_n_batches=10**6)
    )
    expected = main(config)
    on_save(monkeypatch, lambda path: time.sleep(0.4))
    slow = elsewhere(config, "slow")
    summary = main(slow)
    assert same(weights(slow.checkpoint_dir), weights(config.checkpoint_dir))
    assert summary["val_loss"] == expected["val_loss"]
    assert (
        load_sealed(Path(slow.checkpoint_dir) / "model_latest.pt")["save_number"] < 3 * 12
    )  # ends of epochs
    assert summary["saving_share_background"] > 0.1 and summary["saving_share"] > 0


def test_saves_by_batches_have_a_least_time_between_them(tiny_settings, monkeypatch):
    """A fast device saves every so many batches only if the seconds have passed too; minutes and signals know no least time."""
    settings = tiny_settings | dict(save_every_n_batches=10, save_min_seconds=30.0)
    clock = [1000.0]
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time))
    config = ResidualConfig(**settings, save_every_minutes=2.0)
    with Checkpointer(config, "data", "run", open_runtime(config).group) as checkpointer:

        def due(batch, seconds):
            clock[0] = 1000.0 + seconds
            return checkpointer.due(batch)

        assert [due(10, 29), due(20, 30), due(21, 31)] == [False, True, False]
        assert due(33, 119) is False and due(33, 120) is True  # by time
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_requested", lambda **_: True)
            assert due(1, 1) is True
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "stop_reason", lambda: "SIGTERM")
            assert due(1, 1) is True
        clock[0] = 1100.0
        checkpointer.save("now", LanguageModel(config, 50), {})
        assert [due(20, 110), due(30, 131)] == [False, True]  # since that save
    without = dataclasses.replace(
        config, save_min_seconds=0.0, checkpoint_dir=config.checkpoint_dir + "_without"
    )
    with Checkpointer(without, "data", "run", open_runtime(config).group) as checkpointer:
        assert checkpointer.due(10) is True and checkpointer.due(11) is False


def test_what_is_saved_is_the_state_at_that_moment(tiny_settings, monkeypatch):
    """Training goes on while the thread writes; the file holds no bit of that."""
    config = ResidualConfig(**tiny_settings, save_every_minutes=0.0)
    model = LanguageModel(config, 50)
    with Checkpointer(config, "data", "run", open_runtime(config).group) as checkpointer:
        before = {name: tensor.clone() for name, tensor in model.trained_state().items()}
        contexts = torch.zeros(3, 4)
        on_save(monkeypatch, lambda path: time.sleep(0.3))
        checkpointer.save("now", model, {"contexts": contexts, "history": [1]})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
            contexts.add_(1)
    found = load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")
    assert same(found["model_state_dict"], before) and not found["stage_state"]["contexts"].any()


def test_a_stop_whose_state_cannot_be_written_says_so(tiny_settings, monkeypatch):
    """Not "continue": the sentence names the reason, and what was written before is whole."""
    config = ResidualConfig(**tiny_settings)
    monkeypatch.setattr(checkpoint, "WAIT", 0.0)
    number = iter(range(10**6))

    def full(path):
        if (nth := next(number)) > 4:
            if nth == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            raise OSError(28, "No space left on device")

    on_save(monkeypatch, full)
    with pytest.raises(
        UserError, match=r"SIGTERM received, but the state could not be written \(No space left"
    ):
        main(config)
    assert all(tensor.isfinite().all() for tensor in weights(config.checkpoint_dir).values())


# Frozen tensors


def test_frozen_tensors_are_stored_once_and_referred_to(tiny_settings):
    """One file of them beside checkpoints without them, and the same after a second run with the same seed."""
    config = ResidualConfig(**tiny_settings, freeze_context=True)
    main(config)
    folder = Path(config.checkpoint_dir)
    (frozen,) = folder.glob("model_frozen_*.pt")
    tensors = load_sealed(frozen)
    assert set(tensors) == {"context_embedding"} and frozen == frozen_path(folder, frozen_digest(tensors))
    others = [path for path in folder.glob("model_*.pt") if path != frozen]
    assert len(others) >= 7
    for path in others:
        found = load_sealed(path)
        assert "context_embedding" not in found["model_state_dict"] and found["frozen"] == frozen_digest(
            tensors
        )


def test_other_frozen_tensors_come_from_the_file(tiny_settings, monkeypatch):
    """A torch that draws other numbers from the same seed must not change a run; without the file it is refused."""
    config = ResidualConfig(**tiny_settings, phase="1", freeze_context=True)
    main(config)
    expected = main(dataclasses.replace(config, phase="both"))["val_loss"]
    moved = elsewhere(config, "moved")
    main(moved)
    real = LanguageModel.__init__

    def drawn_differently(self, *arguments):
        real(self, *arguments)
        self.context_embedding.add_(0.5)

    monkeypatch.setattr(LanguageModel, "__init__", drawn_differently)
    (frozen,) = Path(moved.checkpoint_dir).glob("model_frozen_*.pt")
    aside = frozen.rename(frozen.with_suffix(".aside"))
    before = (Path(moved.checkpoint_dir) / "model_latest.pt").read_bytes()
    stopped_in_phase_2 = dataclasses.replace(moved, phase="both")
    with pytest.raises(UserError, match=f"frozen embeddings cannot be read.*{frozen.name}"):
        main(stopped_in_phase_2)
    assert (Path(moved.checkpoint_dir) / "model_latest.pt").read_bytes() == before
    aside.rename(frozen)
    assert main(stopped_in_phase_2)["val_loss"] == expected


# Kept files


@pytest.mark.parametrize("kept", ["model_epoch.pt", "model_phase1.pt", "model_step_*.pt"])
def test_files_of_epochs_phases_and_steps_continue_a_run(tiny_settings, kept):
    """All else lost, each of them leads to the same end."""
    config = ResidualConfig(**tiny_settings)
    main(config)
    expected, folder = weights(config.checkpoint_dir), Path(config.checkpoint_dir)
    alone = [path for path in folder.glob("model_*.pt") if path.match(kept)]
    for path in (
        set(folder.glob("model_*.pt"))
        - set(alone)
        - set(folder.glob("model_frozen_*"))
        - set(folder.glob("*best.pt"))
    ):
        path.unlink()
    labels = {load_sealed(path)["epoch"] for path in alone}
    assert labels & {"phase2_epoch_3", "phase1_complete", "phase2_complete"}
    main(config)
    assert same(weights(folder), expected)


def test_a_best_that_is_newer_than_the_state_is_believed(tiny_settings, monkeypatch):
    """Killed between the two files: the best weights keep their own figures, and the end is the same."""
    config = ResidualConfig(**tiny_settings)
    expected = main(config)
    cut = elsewhere(config, "cut")

    class Killed(Exception):
        pass

    def kill(path):
        if path.name == "model_latest.pt" and (path.parent / "model_best.pt").exists():
            raise Killed

    with monkeypatch.context() as patch:
        on_save(patch, kill)
        with pytest.raises(Killed):
            main(cut)
    folder = Path(cut.checkpoint_dir)
    assert load_sealed(folder / "model_best.pt")["best"]["epoch"] == 1
    assert load_sealed(folder / "model_latest.pt")["stage"] == "phase2"
    assert main(cut)["val_loss"] == expected["val_loss"]
    assert same(weights(folder), weights(config.checkpoint_dir))


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_a_request_saves_now_and_training_goes_on(tiny_settings, monkeypatch):
    """`kill -USR1`: model_backup.pt holds the state of the next batch; the run is not disturbed."""
    config = ResidualConfig(**tiny_settings | dict(save_every_n_batches=10**6))
    expected = main(config)
    asked = elsewhere(config, "asked")
    real, batches = Checkpointer.due, []

    def due(self, batch):
        batches.append(batch)
        if len(batches) == 9 + 5:  # the second iteration of Phase 1, behind the untrained stage
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, batch)

    monkeypatch.setattr(Checkpointer, "due", due)
    assert main(asked)["val_loss"] == expected["val_loss"]
    backup = load_sealed(Path(asked.checkpoint_dir) / "model_backup.pt")
    assert backup["epoch"] == "phase1_iteration_2" and backup["stage_state"]["steps"] == 5
    assert not (Path(config.checkpoint_dir) / "model_backup.pt").exists()


# Room


def test_a_disk_without_room_for_the_run_is_refused_before_it_begins(tiny_settings, monkeypatch):
    """The sentence has both figures; files of this run that are there already count as room."""
    config = ResidualConfig(**tiny_settings)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(
        UserError, match=r"0\.00 GB free and the checkpoints of this run need about 0\.00 GB more"
    ):
        main(config)
    assert not (Path(config.checkpoint_dir) / "model_latest.pt").exists()
    main(dataclasses.replace(config, save_checkpoint=False))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**9))
    main(config)


def test_what_a_run_may_need_is_what_it_takes(tiny_settings, monkeypatch):
    """The announced size of its states bounds the largest file five times, within what a small file's frame adds."""
    config = ResidualConfig(**tiny_settings | dict(context_dim=64, embed_dim=64, num_layers=2))
    main(config)
    vocab_size = load_data(config).vocab_size
    largest = max(path.stat().st_size for path in Path(config.checkpoint_dir).glob("model_*.pt"))
    empty = Path(config.checkpoint_dir) / "empty"
    empty.mkdir()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 5 * (largest - 60_000)))
    with pytest.raises(UserError, match="GB more"):
        checkpoint.require_space(empty, LanguageModel(config, vocab_size), config, torch.float32)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 10 * largest))
    checkpoint.require_space(empty, LanguageModel(config, vocab_size), config, torch.float32)


def test_stopped_runs_leave_no_temporary_files(tiny_settings):
    """Those of killed processes are removed by the next one that holds the folder."""
    config = ResidualConfig(**tiny_settings)
    folder = Path(config.checkpoint_dir)
    folder.mkdir()
    (folder / ".model_latest.pt.12345.tmp").write_bytes(b"torn")
    main(dataclasses.replace(config, phase="1"))
    assert not list(folder.glob(".*.tmp"))
