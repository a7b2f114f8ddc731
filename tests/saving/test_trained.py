"""Who only reads a run gets its newest weights, or a sentence, and leaves the folder as it is."""

from dataclasses import replace

import pytest
import torch
from helpers import stop_after

import train
from config import ResidualConfig
from newllm.data.samples import load_data
from newllm.errors import UserError
from newllm.models.network import LanguageModel
from newllm.saving.files import load_sealed, save_sealed
from newllm.saving.trained import load_trained


@pytest.fixture
def run(tiny_settings):
    """(configuration, data, folder) of a complete run."""
    config = ResidualConfig(**tiny_settings)
    train.main(config)
    return config, load_data(config), config.checkpoint_dir


def read(config, data):
    """A fresh model, and the line about what was loaded into it."""
    model = LanguageModel(config, data.vocab_size)
    return model, load_trained(config, model, data.fingerprint)


def test_a_complete_run_gives_the_weights_of_its_lowest_validation_loss(run, tmp_path):
    """Those of model_best.pt, every tensor."""
    config, data, _ = run
    model, line = read(config, data)
    best = load_sealed(tmp_path / "checkpoints" / "model_best.pt")["model_state_dict"]
    assert line.startswith("phase2_complete of run ")
    assert best.keys() == model.trained_state().keys()
    assert all(torch.equal(best[name], tensor) for name, tensor in model.trained_state().items())


def test_nothing_trained_is_no_error(run, tmp_path):
    """No folder (and none is made), an empty one, load_checkpoint off, a run still at its untrained row: None, model as it was."""
    config, data, _ = run
    (tmp_path / "empty").mkdir()
    latest = tmp_path / "checkpoints" / "model_latest.pt"
    save_sealed(load_sealed(latest) | {"stage": "untrained"}, latest)
    others = [dict(checkpoint_dir=str(tmp_path / name)) for name in ("missing", "empty", "checkpoints")]
    for changes in (*others, dict(load_checkpoint=False)):
        model, line = read(replace(config, **changes), data)
        assert line is None
        fresh = LanguageModel(config, data.vocab_size).state_dict()
        assert all(torch.equal(fresh[name], tensor) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "missing").exists()


def test_weights_of_other_settings_are_not_read(run, tmp_path):
    """Not those of the stage in hand either; a run that is parked is read where it lies."""
    config, data, _ = run
    with pytest.raises(UserError, match=r"holds other runs: another run than \S+ \(context_dim 16 -> 12\)"):
        read(replace(config, context_dim=12), data)
    other = replace(config, phase1_learning_rate=0.01, untrained_control=False)
    stop_after(other, 2)
    assert read(other, data)[1].startswith("phase1_iteration_1 of run ")
    with pytest.raises(UserError, match=r"phase1_learning_rate 0\.01 -> 0\.02"):
        read(replace(other, phase1_learning_rate=0.02), data)
    assert read(config, data)[1].startswith("phase2_complete of run ")


def test_a_damaged_newest_state_gives_the_one_before_and_all_damaged_ones_a_sentence(run, tmp_path):
    """Nothing is set aside or renamed: that is for the run itself."""
    config, data, _ = run
    folder = tmp_path / "checkpoints"
    (folder / "model_latest.pt").write_bytes(b"torn")
    names = sorted(path.name for path in folder.iterdir())
    assert read(config, data)[1]
    assert sorted(path.name for path in folder.iterdir()) == names
    for path in folder.glob("model_*.pt"):
        path.write_bytes(b"torn")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        read(config, data)
