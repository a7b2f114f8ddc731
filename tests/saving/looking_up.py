"""Small runs that look things up, for the tests of that stage: their settings, figures and files."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from kills import difference

import train
from config import ResidualConfig
from newllm.saving.files import load_sealed
from newllm.saving.trained import RETRIEVAL

ON, OFF = "ngram,cache,knn", "none"
ROWS = "val_ppl_retrieval", "val_ppl_retrieval_counting", "val_ppl_retrieval_untrained"
SMALL = dict(
    tokenizer="bpe", vocab_size=300, num_samples=6, val_samples=4, max_seq_length=16, context_dim=8,
    embed_dim=8, num_layers=1, phase1_max_iterations=1, phase2_epochs=2, dropout=0.3, min_batches=3,
    precision="fp32", device="cpu", artifacts=False,
)  # fmt: skip


class Runs:
    """Complete runs by their setting `retrieval`, and one killed before the stage, each made once."""

    def __init__(self, scratch, corpus):
        self.scratch, self.made = scratch, {}
        self.settings = SMALL | dict(data_source=str(corpus), cache_dir=str(scratch / "cache"))

    def complete(self, setting):
        """(configuration, summary)."""
        if setting not in self.made:
            folder = str(self.scratch / setting)
            config = ResidualConfig(**self.settings, retrieval=setting, checkpoint_dir=folder)
            self.made[setting] = config, train.main(config)
        return self.made[setting]

    def cut(self):
        """Configuration of a run that was killed when all but the stage was done."""
        if "cut" not in self.made:
            folder = str(self.scratch / "cut")
            self.made["cut"] = ResidualConfig(**self.settings, retrieval=ON, checkpoint_dir=folder)
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(train.Run, "complete_untrained_row", killed)
                train.main(self.made["cut"])
            assert latest(self.made["cut"])["stage"] == "retrieval"
        return self.made["cut"]


def killed(*_):
    raise KeyboardInterrupt


def copy_of(config, folder, **changes):
    """The configuration of a copy of a run, made in a folder."""
    shutil.copytree(config.checkpoint_dir, folder)
    return replace(config, checkpoint_dir=str(folder), **changes)


def latest(config, *below):
    return load_sealed(Path(config.checkpoint_dir, *below, "model_latest.pt"))


def retrieval_file(config, *below):
    return Path(config.checkpoint_dir, *below, RETRIEVAL)


def kept(config, *below):
    """What the file beside the weights holds, but for the id of the run that wrote it."""
    content = load_sealed(retrieval_file(config, *below))
    return {name: value for name, value in content.items() if name != "run_id"}


def assert_equal(config, expected):
    """Both runs ended with the same results, weights and file, to the bit; times do not count."""
    one, other = latest(config), latest(expected)
    for name in ("results", "model_state_dict"):
        assert not (found := difference(one[name], other[name], name)), found
    assert not (found := difference(kept(config), kept(expected), "file")), found


def train_nothing(monkeypatch):
    """From here on a run fails that takes an optimizer step."""

    def step(*_):
        pytest.fail("a step was taken")

    monkeypatch.setattr(train.EpochLoop, "_step", step)
