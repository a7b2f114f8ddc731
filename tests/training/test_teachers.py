"""Targets of which teachers have a share: what they say, which files they are, that they stay the same."""

import contextlib
import dataclasses
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import stop_after
from torch.nn import functional

import train
from config import ResidualConfig
from newllm.errors import UserError
from newllm.evaluate import encode
from newllm.phases.phase2 import DRAWS, TAUGHT_EPOCHS, taught_targets
from newllm.saving.files import verify_seal
from newllm.saving.runs import newest_state
from newllm.saving.teachers import identified, open_teachers
from newllm.saving.trained import open_model


@pytest.fixture
def taught(tiny_settings):
    """(Settings of a run, files of two trained models of another kind and seed)."""
    settings = tiny_settings | dict(untrained_control=False)
    files = []
    for number, kind in enumerate(("gru", "context")):
        folder = settings["checkpoint_dir"] + kind
        own = dict(model_type=kind, checkpoint_dir=folder, artifacts=True, phase2_epochs=1 + number)
        train.main(ResidualConfig(**settings | own))
        files += Path(folder).glob("*/models/*.pth")
    return settings, files


def test_teachers_have_their_share_of_the_targets(taught):
    """Draws follow the mean of their predictions; a run of them goes on exactly where it stopped."""
    settings, files = taught
    names = ", ".join(map(str, files))
    changes = dict(label_smoothing=0.5, teachers=names, phase1_max_iterations=0)
    config = ResidualConfig(**settings | changes)
    _, tokenizer, content = open_model(files[0])
    teachers = open_teachers(config, content["data_fingerprint"], "cpu")
    runtime = SimpleNamespace(autocast=contextlib.nullcontext, device=torch.device("cpu"))
    samples = torch.randint(tokenizer.vocab_size, (1, 9)).repeat(400, 1).int()
    drawn = taught_targets(teachers, samples, runtime, torch.Generator().manual_seed(0))
    assert drawn.shape == (400, 8, TAUGHT_EPOCHS * DRAWS)
    shares = [taught_share(model, samples[:1, :-1].long()) for model in teachers]
    counted = torch.stack([row.flatten().bincount(minlength=tokenizer.vocab_size) for row in drawn.unbind(1)])
    torch.testing.assert_close(counted / counted.sum(1, True), sum(shares) / 2, rtol=0, atol=0.02)

    expected = train.main(dataclasses.replace(config, checkpoint_dir=config.checkpoint_dir + "_whole"))
    stop_after(config, 4)
    assert train.main(config)["val_loss"] == expected["val_loss"]
    by_counting = dataclasses.replace(config, teachers="", checkpoint_dir=config.checkpoint_dir + "_counted")
    assert train.main(by_counting)["val_loss"] != expected["val_loss"]


@torch.no_grad()
def taught_share(model, ids):
    """Probabilities [T, V] after each of ids [1, T]."""
    contexts, streams = encode(model, ids)
    return functional.linear(model.hidden(contexts, streams), *model.output_weights()).softmax(-1)[0]


def test_what_cannot_teach_is_said_before_anything_is_trained(taught, tmp_path, capsys):
    """Nothing there, no model, an empty folder, no head, other data, another file than the setting says."""
    settings, files = taught
    (tmp_path / "text.pth").write_text("no model")
    (tmp_path / "empty").mkdir()
    phase1 = settings["checkpoint_dir"] + "context/model_phase1.pt"
    for changes, sentence in (
        (dict(teachers="nowhere.pth"), "teacher nowhere.pth cannot be read"),
        (dict(teachers=f"{tmp_path}/text.pth"), "text.pth cannot be read"),
        (dict(teachers=f"{tmp_path}/empty"), "empty cannot be read"),
        (dict(teachers="~nosuchuser/a.pth"), "no such user"),
        (dict(teachers=phase1), "model_phase1.pt has not begun Phase 2, so it predicts nothing"),
        (dict(teachers=str(files[0]), vocab_size=280), "other text, samples or ids"),
        (dict(teachers=str(files[0]), max_seq_length=32), "other text, samples or ids"),
        (dict(teachers=str(files[0]), val_samples=7), "other text, samples or ids"),
        (dict(teachers=f"{files[0]},{files[1]}#0123456789ab"), "in place of #0123456789ab: restore it"),
    ):
        config = ResidualConfig(**settings | changes)
        with pytest.raises(UserError, match=re.escape(sentence)):
            train.main(config)
        assert not Path(config.checkpoint_dir).exists()
    assert capsys.readouterr().err == ""  # one sentence each, and no note beside it


def test_another_model_at_the_same_path_makes_another_run(taught):
    """A run that has begun keeps its targets, or says what is gone; the one before lies whole beside it."""
    settings, files = taught
    teacher = files[0].with_name("teacher#1.pth")  # no checksum
    shutil.copy(files[0], teacher)
    changes = dict(teachers=f" {teacher} ", label_smoothing=0.5, phase1_max_iterations=0)
    config = ResidualConfig(**settings | changes)
    stop_after(config, 4)
    begun = newest_state(config.checkpoint_dir)
    assert begun["config"]["teachers"] == identified(config).teachers
    assert re.fullmatch(re.escape(str(teacher)) + "#[0-9a-f]{12}", identified(config).teachers)
    shutil.copy(files[1], teacher)
    assert train.main(config)["run_id"] != begun["run_id"]
    shutil.copy(files[0], teacher)
    assert train.main(config)["run_id"] == begun["run_id"]
    without_share = dataclasses.replace(config, teachers="nowhere.pth", label_smoothing=0.0)
    assert identified(without_share) == without_share


def test_a_folder_teaches_by_its_newest_state_unless_it_is_the_runs_own(taught):
    """The run would move it aside, and teach itself by what it has just written."""
    settings, files = taught
    folder = Path(settings["checkpoint_dir"] + "gru")
    config = ResidualConfig(**settings, teachers=str(folder))

    def digits(**changes):
        return identified(dataclasses.replace(config, **changes)).teachers.rpartition("#")[2]

    seal = verify_seal(folder / "model_latest.pt")
    assert digits() == digits(teachers=str(folder / "model_latest.pt")) == seal[:12]
    for inside in (folder, folder / "model_best.pt"):
        with pytest.raises(UserError, match="lies among the files that this run moves aside"):
            train.main(dataclasses.replace(config, checkpoint_dir=str(folder), teachers=str(inside)))
    beside = digits(checkpoint_dir=str(folder), teachers=str(files[0]))
    assert beside == verify_seal(files[0])[:12]
