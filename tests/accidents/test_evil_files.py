"""What a run makes of files that do harm: nothing is executed, and nothing is lost."""

import random
from pathlib import Path

import pytest
from helpers import write_evil
from left_behind import content

from config import ResidualConfig
from newllm.errors import UserError
from newllm.report.record import RunLog
from train import main


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "bare"])
def test_evil_pickles_in_place_of_every_state_are_never_executed(after_phase_1, tmp_path, sealed):
    """With the right checksum or without: refused, kept, nothing done; in the latest alone the state before it is used."""
    for path in Path(after_phase_1.checkpoint_dir).glob("model_*.pt"):
        path.unlink()
        write_evil(path, tmp_path / "harm", sealed)
    before = content(after_phase_1)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        main(after_phase_1)
    assert content(after_phase_1) == before and not (tmp_path / "harm").exists()


def test_an_evil_pickle_in_the_latest_alone_is_set_aside(after_phase_1, tmp_path, capsys):
    """The run goes on from the state before, and the file is kept as .corrupt."""
    latest = Path(after_phase_1.checkpoint_dir) / "model_latest.pt"
    latest.unlink()
    write_evil(latest, tmp_path / "harm")
    evil = latest.read_bytes()
    assert main(after_phase_1)["phase1_steps"] == 9
    assert "kept as model_latest.pt.corrupt" in capsys.readouterr().out
    assert (
        latest.with_name("model_latest.pt.corrupt").read_bytes() == evil and not (tmp_path / "harm").exists()
    )


def test_an_evil_pickle_in_the_cache_is_never_executed(after_phase_1, tmp_path, capsys):
    """The data is built again, and is the same, or the checkpoint would be refused."""
    (path,) = Path(after_phase_1.cache_dir).glob("*.pt")
    write_evil(path, tmp_path / "harm")
    main(after_phase_1)
    assert "has been rebuilt" in capsys.readouterr().out and not (tmp_path / "harm").exists()


@pytest.mark.parametrize("harm", ["evil", "damaged", "missing"])
def test_best_weights_that_cannot_be_trusted_stop_the_run_with_a_sentence(
    tiny_settings, tmp_path, monkeypatch, harm
):
    """A run cut off in Phase 2 needs its model_best.pt: an evil one is not executed, none is replaced by something else."""

    class Cut(Exception):
        pass

    def cut(self, stage, **values):
        if stage == "phase2" and values["epoch"] == 2:
            raise Cut

    config, real = ResidualConfig(**tiny_settings), RunLog.log
    monkeypatch.setattr(RunLog, "log", cut)
    with pytest.raises(Cut):
        main(config)
    monkeypatch.setattr(RunLog, "log", real)
    best, latest = (Path(config.checkpoint_dir) / name for name in ("model_best.pt", "model_latest.pt"))
    before = latest.read_bytes()
    data = bytearray(best.read_bytes())
    best.unlink()
    if harm == "evil":
        write_evil(best, tmp_path / "harm")
    elif harm == "damaged":
        data[random.Random(0).randrange(len(data))] ^= 1
        best.write_bytes(data)
    with pytest.raises(UserError, match=r"best weights.*model_best\.pt") as caught:
        main(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists() and latest.read_bytes() == before
