"""What a run makes of links: followed where they lead to something, else refused and left alone."""

from pathlib import Path

import pytest

from config import ResidualConfig
from newllm.errors import UserError
from newllm.saving.files import load_sealed
from train import main


@pytest.mark.parametrize("name", ["cache_dir", "checkpoint_dir"])
def test_a_link_that_leads_to_no_folder_is_refused(tiny_settings, tmp_path, name):
    """To nothing, to a file, to itself, or a folder below one of these: a sentence that names it, and nothing is made."""
    (tmp_path / "file").write_text("keep me")
    links = {"dangling": tmp_path / "gone", "to_file": tmp_path / "file", "loop": tmp_path / "loop"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
        for path in (tmp_path / link, tmp_path / link / "below"):
            with pytest.raises(UserError, match=link) as caught:
                main(ResidualConfig(**tiny_settings | {name: str(path)}))
            assert "\n" not in str(caught.value) and (tmp_path / link).is_symlink()
    assert (tmp_path / "file").read_text() == "keep me" and not (tmp_path / "gone").exists()


def test_folders_below_a_linked_folder_are_used_through_the_link(tiny_settings, tmp_path):
    """`drive/checkpoints` where `drive` is a link: the files lie where it leads, and it stays a link."""
    (tmp_path / "mounted").mkdir()
    (tmp_path / "drive").symlink_to(tmp_path / "mounted")
    folders = {name: str(tmp_path / "drive" / name) for name in ("cache_dir", "checkpoint_dir")}
    main(ResidualConfig(**tiny_settings | folders, phase="1"))
    assert (tmp_path / "drive").is_symlink() and (
        tmp_path / "mounted/checkpoint_dir/model_latest.pt"
    ).exists()
    assert list((tmp_path / "mounted/cache_dir").glob("*.pt"))


def test_a_dangling_link_inside_the_checkpoint_folder_is_refused(tiny_settings):
    """Where the record of the run should go."""
    Path(tiny_settings["checkpoint_dir"]).mkdir()
    (Path(tiny_settings["checkpoint_dir"]) / "dialogues").symlink_to("gone")
    with pytest.raises(UserError, match="dialogues"):
        main(ResidualConfig(**tiny_settings))


def test_a_checkpoint_that_is_a_link_to_a_file_is_continued_and_its_target_unharmed(after_phase_1, tmp_path):
    """The state is read through the link; what is written takes the link's place, not the file elsewhere."""
    latest, elsewhere = Path(after_phase_1.checkpoint_dir) / "model_latest.pt", tmp_path / "elsewhere.pt"
    latest.rename(elsewhere)
    latest.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    assert main(after_phase_1)["phase1_steps"] == 9
    assert elsewhere.read_bytes() == before
    assert load_sealed(latest)["epoch"] == "phase2_complete"


def test_a_checkpoint_that_is_a_dangling_link_is_refused(after_phase_1):
    """The state lies elsewhere and is out of reach: no fresh start, and the link stays."""
    folder = Path(after_phase_1.checkpoint_dir)
    for path in folder.glob("model_*.pt"):
        path.unlink()
    (folder / "model_latest.pt").symlink_to("gone.pt")
    with pytest.raises(UserError, match=r"model_latest\.pt") as caught:
        main(after_phase_1)
    assert "\n" not in str(caught.value) and (folder / "model_latest.pt").is_symlink()
