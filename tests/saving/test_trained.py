"""Who only reads a run gets its newest weights, or a sentence, and leaves the folder as it is."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import stop_after

import train
from config import ResidualConfig
from newllm.data.samples import load_data
from newllm.errors import UserError
from newllm.models.network import LanguageModel
from newllm.saving.checkpoint import only_reading
from newllm.saving.files import load_sealed
from newllm.training.runtime import open_runtime


@pytest.fixture
def run(tiny_settings):
    """(configuration, function of a configuration: (a fresh model, whether it was trained, lines))."""
    config = ResidualConfig(**tiny_settings, untrained_control=False)
    train.main(config)
    data = load_data(config)

    def read(config):
        model = LanguageModel(config, data.vocab_size)
        with only_reading(config, data.fingerprint, open_runtime(config).group) as run:
            trained = run.is_done("untrained")
            if trained:
                run.restore(run.stage, model)
            return model, trained, run.notes

    return config, read


def test_weights_are_those_of_the_run_of_the_settings(run):
    """A complete run's of its lowest validation loss, a parked one's, none of other settings."""
    config, read = run
    _, trained, lines = read(replace(config, context_dim=12))
    assert not trained and lines[0].startswith("another run than") and "(context_dim 16 -> 12)" in lines[0]
    other = replace(config, phase1_learning_rate=0.01)
    stop_after(other, 2)
    assert "in Phase 1, iteration 1, batch" in read(other)[2][-1]
    assert not read(replace(other, phase1_learning_rate=0.02))[1]
    model, trained, lines = read(config)
    (best,) = Path(config.checkpoint_dir).glob("runs/*/model_best.pt")
    best = load_sealed(best)["model_state_dict"]
    assert trained and "at its end" in lines[-1] and best.keys() == model.trained_state().keys()
    assert all(torch.equal(best[name], tensor) for name, tensor in model.trained_state().items())


def test_nothing_trained_is_no_error(run, tmp_path):
    """No folder (and none is made), an empty one, load_checkpoint off: None, model as it was."""
    config, read = run
    (tmp_path / "empty").mkdir()
    others = [dict(checkpoint_dir=str(tmp_path / name)) for name in ("missing", "empty")]
    for changes in (*others, dict(load_checkpoint=False)):
        model, trained, _ = read(replace(config, **changes))
        assert not trained
        fresh = LanguageModel(config, model.vocab_size).state_dict()
        assert all(torch.equal(fresh[name], tensor) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "missing").exists()


def test_a_damaged_newest_state_gives_the_one_before_and_all_damaged_ones_a_sentence(run):
    """Nothing is set aside or renamed: that is for the run itself."""
    config, read = run
    folder = Path(config.checkpoint_dir)
    (folder / "model_latest.pt").write_bytes(b"torn")
    names = sorted(path.name for path in folder.iterdir())
    assert read(config)[1]
    assert sorted(path.name for path in folder.iterdir()) == names
    for path in folder.glob("model_*.pt"):
        path.write_bytes(b"torn")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        read(config)
