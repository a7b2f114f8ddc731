"""Contexts and features in files: the same run to the bit, and no silent use of what was damaged."""

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import stop_after

from config import ResidualConfig
from newllm.errors import UserError
from newllm.saving.checkpoint import Checkpointer
from newllm.saving.files import load_sealed
from newllm.training.contexts import FILES, SampleStore
from train import main

SPILLED = dict(context_memory_mb=0)


def weights(config):
    return load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")["model_state_dict"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def files(config):
    return sorted(path.name for path in Path(config.checkpoint_dir).glob(FILES))


def elsewhere(config, name, **changes):
    return dataclasses.replace(config, checkpoint_dir=f"{config.checkpoint_dir}_{name}", **changes)


def test_rows_are_adopted_only_if_they_are_those_that_were_written(tmp_path):
    """Each row has a checksum of its own: a flipped bit, a missing end and a missing file are all found."""
    path = tmp_path / "rows.bin"
    store = SampleStore(4, (2, 3), torch.float32, "cpu", path)
    store[torch.tensor([0, 2, 3])] = torch.randn(3, 2, 3)
    store.sync()
    digests, content = store.digests.clone(), path.read_bytes()

    def adopted(content=None):
        path.unlink() if content is None else path.write_bytes(content)
        again = SampleStore(4, (2, 3), torch.float32, "cpu", path)
        return again.adopt(digests) and torch.equal(again[torch.arange(4)], store[torch.arange(4)])

    def flipped(at):
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    assert adopted(content) and adopted(flipped(len(content) // 4 + 3))  # row 1 was never written
    assert not adopted(flipped(3)) and not adopted(content[:-1]) and not adopted()


def test_a_full_disk_is_a_sentence():
    """Nothing is half kept: the row has no checksum, and the run ends with what to do."""
    store = SampleStore(2, (3,), torch.float32, "cpu", "/dev/full")
    sentence = r"/dev/full \(No space left on device\): mend that, or raise --context_memory_mb"
    with pytest.raises(UserError, match=sentence):
        store[torch.tensor([1])] = torch.ones(1, 3)
    assert (store.digests == -1).all()


@pytest.mark.parametrize("freeze", [True, False])
def test_a_run_on_files_ends_with_the_bits_of_one_in_memory(tiny_settings, freeze):
    """Weights and metrics; and no file is left."""
    config = ResidualConfig(**tiny_settings, freeze_context=freeze)
    on_files = elsewhere(config, "files", **SPILLED)
    expected, found = main(config), main(on_files)
    assert same(weights(config), weights(on_files)) and not files(on_files)
    for name in ("val_loss", "er_train", "settle_sweeps", "settle_error", "val_ppl_untrained_context"):
        assert found[name] == expected[name], name


@pytest.fixture
def whole(tiny_settings):
    """Settings of a Phase 1, and the weights it ends with when nothing happens to it."""
    config = ResidualConfig(**tiny_settings, phase="1", untrained_control=False)
    main(config)
    return config, weights(config)


def test_cut_off_in_any_batch_it_goes_on_to_the_same_bits(whole):
    """In the first and the last iteration, from one file and from the other."""
    config, expected = whole
    for batches in (1, 6, 8):
        cut = elsewhere(config, str(batches), **SPILLED)
        stop_after(cut, batches)
        assert len(files(cut)) == 2
        main(cut)
        assert same(weights(cut), expected) and not files(cut)


@pytest.mark.parametrize("harm", ["lost", "damaged"])
def test_without_its_files_a_run_says_so_and_goes_on(tiny_settings, capsys, harm):
    """Contexts are computed again from the weights; nobody believes that it is the same run."""
    config = ResidualConfig(**tiny_settings, **SPILLED, untrained_control=False)
    stop_after(config, 5)
    for path in Path(config.checkpoint_dir).glob(FILES):
        path.unlink() if harm == "lost" else path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    capsys.readouterr()
    summary = main(config)
    assert "stored contexts are gone, damaged" in capsys.readouterr().out
    assert summary["phase1_steps"] == 9 and summary["val_loss"] > 0


def test_files_of_an_iteration_wait_for_the_save_that_ends_it(whole, monkeypatch):
    """The next iteration overwrites them: a process killed right after it began still finds all it needs."""
    config, expected = whole
    cut = elsewhere(config, "cut", **SPILLED)

    class Killed(BaseException):
        pass

    real, steps = Checkpointer.due, []

    def due(self, batch):
        steps.append(batch)
        if len(steps) == 4:  # the first batch of the second iteration has been written to the files
            self.wait()
            raise Killed
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "due", due)
        with pytest.raises(Killed):
            main(cut)
    state = load_sealed(Path(cut.checkpoint_dir) / "model_latest.pt")
    assert state["epoch"] == "phase1_iteration_1" and state["stage_state"]["samples"] == 0
    main(cut)
    assert same(weights(cut), expected)
