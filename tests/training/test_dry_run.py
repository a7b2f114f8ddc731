"""A dry run: all that a run says before its first step, and not a byte outside of the data's cache."""

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from config import ResidualConfig
from newllm.errors import UserError


@pytest.fixture
def dry(tiny_settings, tmp_path, capsys):
    """Function of settings to lines of a dry run, after which each file outside of the cache is as before."""

    def files():
        found = {
            path: path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest()
            for path in tmp_path.rglob("*")
        }
        return {path: digest for path, digest in found.items() if "cache" not in path.parts}

    def dried(**settings):
        before = files()
        capsys.readouterr()
        try:
            assert train.main(ResidualConfig(**tiny_settings | settings), dry_run=True) is None
        finally:
            assert files() == before
        return capsys.readouterr().out.splitlines()

    return dried


def test_a_first_run(dry, tiny_settings):
    """Device, data, sizes, memory and disk; no folder, no record, no status."""
    lines = dry(adapter_rank=4)
    starts = "device: ", "data: ", "tokenizer: ", "model: ", "memory: predicted peak ", "disk: "
    for start in (*starts, "checkpoint in "):
        assert sum(line.startswith(start) for line in lines) == 1, start
    assert "warning: adapter_rank 4 has no effect: there is no adapter (context_adapter)" in lines
    assert "fits: margin" in "".join(lines) and lines[-1].startswith("dry run: nothing was trained")
    assert not Path(tiny_settings["checkpoint_dir"]).exists()


def test_what_would_be_continued(dry, tiny_settings):
    """A run cut off, one that is complete, another run beside it, second copies."""
    train.main(ResidualConfig(**tiny_settings, phase="1", untrained_control=False))
    same = dict(untrained_control=False)
    assert any("continuing run" in line for line in dry(**same))
    assert any("another run than" in line and "num_samples 12 -> 13" in line for line in dry(num_samples=13))
    assert any("load_checkpoint is off" in line for line in dry(load_checkpoint=False))
    assert "taken over: the n-gram counts" in "".join(dry(**same, phase1_learning_rate=0.01))
    latest = Path(tiny_settings["checkpoint_dir"]) / "model_latest.pt"
    shutil.copytree(tiny_settings["checkpoint_dir"], f"{tiny_settings['checkpoint_dir']}_2")
    for path in latest.parent.glob("model_*.pt"):
        path.unlink()
    copies = f"{tiny_settings['checkpoint_dir']}_2"
    assert any(f"in {copies}: continuing run" in line for line in dry(**same, backup_dir=copies))
    latest.write_bytes(b"torn")
    with pytest.raises(UserError, match="can be read"):
        dry(**same)


def test_what_a_run_would_be_refused_for(dry, tiny_settings, tmp_path, monkeypatch):
    """A file in the folder's place, copies inside the folder, a full disk."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        dry(checkpoint_dir=str(tmp_path / "file"))
    with pytest.raises(UserError, match="must not lie in each other"):
        dry(backup_dir=tiny_settings["checkpoint_dir"] + "/copies")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="make room"):
        dry()
    assert any(line.startswith("dry run") for line in dry(save_checkpoint=False))
