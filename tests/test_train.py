"""train.py as a user runs it, and what a run leaves behind."""

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import run

import train
from config import ResidualConfig
from newllm.errors import UserError
from newllm.report.record import read_rows

KEYS = {
    "phase1_steps", "phase1_param_change", "phase1_iterations", "converged_ratio", "er_train", "er_val",
    "er_val_untrained", "er_ceiling", "cold_start_error_10", "contraction", "memory_horizon", "val_loss", "val_ppl",
    "val_bpb", "val_acc", "val_ppl_untrained_context", "val_ppl_bigram", "val_ppl_kn", "tok_per_s_phase1",
    "peak_memory_mb", "peak_memory_mb_predicted", "seconds",
}  # fmt: skip
TIMES = (
    "run_id",
    "date",
    "seconds",
    "tok_per_s_phase1",
    "tok_per_s_phase2",
    "peak_memory_mb",
    "peak_memory_mb_predicted",
    "seconds_phase1",
    "seconds_phase2",
    "seconds_training",
    "saving_share",
    "saving_share_background",
)


def weights(folder):
    return torch.load(Path(folder) / "model_latest.pt", map_location="cpu")["model_state_dict"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_train_as_a_command_ends_with_the_block_and_leaves_a_checkpoint(tiny_settings):
    """`python3 train.py` exits 0, prints every key of the block, and the guide's inspection snippet works on its file."""
    done = run("train.py", tiny_settings)
    assert done.returncode == 0, done.stderr
    block = dict(line.split(": ", 1) for line in done.stdout.split("\n---\n")[1].splitlines())
    assert set(block) >= KEYS
    assert "differs from config.py: " in done.stdout
    checkpoint = torch.load(Path(tiny_settings["checkpoint_dir"]) / "model_latest.pt", map_location="cpu")
    assert checkpoint["epoch"] == "phase2_complete"
    assert len(checkpoint["phase2_history"]["train_loss"]) == 3
    assert checkpoint["phase2_history"]["val_loss"][-1] > 0
    (log,) = (Path(tiny_settings["checkpoint_dir"]) / "dialogues" / "logs").glob("metrics_*.jsonl")
    rows = list(read_rows(log))
    assert [row["stage"] for row in rows if row["stage"] in ("start", "summary")] == ["start", "summary"]
    assert sum(row["stage"] == "phase1" for row in rows) == checkpoint["phase1_history"]["cvfp"].__len__()


def test_two_runs_with_one_seed_are_identical_and_another_seed_is_not(tiny_settings):
    """Same seed, same machine: every metric and every weight agree exactly."""
    summaries, states = [], []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = tiny_settings["checkpoint_dir"] + name
        summaries.append(
            train.main(ResidualConfig(**tiny_settings | {"checkpoint_dir": folder, "seed": seed}))
        )
        states.append(weights(folder))
    fixed = [{k: v for k, v in s.items() if k not in TIMES} for s in summaries]
    assert fixed[0] == fixed[1] and same(states[0], states[1])
    assert fixed[0]["val_loss"] != fixed[2]["val_loss"] and not same(states[0], states[2])


@pytest.mark.parametrize("freeze", [True, False])
def test_a_run_cut_at_any_save_continues_to_the_same_bits(tiny_settings, monkeypatch, freeze):
    """Whatever save was the last, the resumed run ends with the weights and metrics of an uninterrupted one."""
    config = ResidualConfig(**tiny_settings, freeze_context=freeze)
    whole = train.main(config)
    expected = weights(config.checkpoint_dir)

    class Cut(Exception):
        pass

    from newllm.saving import checkpoint

    real = checkpoint.save_sealed

    def cut_after(number):
        saves = iter(range(1, number + 1))

        def save(value, path, *previous):
            digest = real(value, path, *previous)
            if next(saves) == number:
                raise Cut
            return digest

        return save

    number, uncut = 0, False
    while not uncut:
        number += 3
        cut = dataclasses.replace(config, checkpoint_dir=f"{config.checkpoint_dir}_{number}")
        cutting = cut_after(number)
        monkeypatch.setattr(checkpoint, "save_sealed", cutting)
        try:
            train.main(cut)
            uncut = True
        except Cut:
            monkeypatch.setattr(checkpoint, "save_sealed", real)
            resumed = train.main(cut)
            assert same(weights(cut.checkpoint_dir), expected), f"cut at save {number}"
            assert not {k for k in whole if whole[k] != resumed[k]} - set(TIMES), f"cut at save {number}"
    assert number > 9


def test_a_complete_run_is_reported_again_not_trained_again(tiny_settings):
    """The same command after the end prints the block from the record and changes nothing."""
    config = ResidualConfig(**tiny_settings)
    first = train.main(config)
    before = (Path(config.checkpoint_dir) / "model_latest.pt").read_bytes()
    again = train.main(config)
    assert {k: v for k, v in first.items() if k not in TIMES} == {
        k: v for k, v in again.items() if k not in TIMES
    }
    assert (Path(config.checkpoint_dir) / "model_latest.pt").read_bytes() == before


def test_phase_1_alone_then_both_equals_both(tiny_settings):
    """`--phase 1` stops after Phase 1; the next run goes on from there and ends as a single run would."""
    both = train.main(ResidualConfig(**tiny_settings))
    apart = ResidualConfig(
        **tiny_settings | {"checkpoint_dir": tiny_settings["checkpoint_dir"] + "_apart"}, phase="1"
    )
    assert "val_loss" not in train.main(apart)
    assert train.main(dataclasses.replace(apart, phase="both"))["val_loss"] == both["val_loss"]


def test_frozen_contexts_do_not_move_in_phase_2(tiny_settings):
    """With freeze_context the context map after Phase 2 is, bit for bit, that of Phase 1; without it is not."""
    for freeze in (True, False):
        folder = f"{tiny_settings['checkpoint_dir']}_{freeze}"
        config = ResidualConfig(
            **tiny_settings | {"checkpoint_dir": folder}, freeze_context=freeze, phase="1"
        )
        train.main(config)
        before = weights(folder)
        train.main(dataclasses.replace(config, phase="both"))
        after = weights(folder)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        in_context = {name for name in before if name.startswith(("context_map", "embed_norm"))}
        assert "embedding.weight" in moved and "context_embedding" not in moved
        assert bool(moved & in_context) != freeze


def test_a_changed_schedule_warns_and_continues(tiny_settings, capsys):
    """Settings that only change what comes next are named and taken."""
    config = ResidualConfig(**tiny_settings, phase="1", untrained_control=False)
    train.main(config)
    train.main(dataclasses.replace(config, phase="both", phase2_learning_rate=0.001))
    assert "warning: settings changed" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_before_the_step_and_keeps_the_last_good_checkpoint(
    tiny_settings, monkeypatch
):
    """One sentence; what is on disk is finite and continues."""
    from newllm.phases import phase1

    real, calls = phase1.phase1_loss, 0

    def poisoned(*args, **kwargs):
        nonlocal calls
        calls += 1
        total, parts = real(*args, **kwargs)
        return (total * float("nan") if calls == 6 else total), parts

    config = ResidualConfig(**tiny_settings)
    monkeypatch.setattr(phase1, "phase1_loss", poisoned)
    with pytest.raises(UserError, match="loss is nan at iteration 2, batch 3 of Phase 1"):
        train.main(config)
    assert all(value.isfinite().all() for value in weights(config.checkpoint_dir).values())
    monkeypatch.setattr(phase1, "phase1_loss", real)
    assert train.main(config)["phase1_steps"] == 9


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(num_samples=500), "dialogues"),
        (dict(data_source="nowhere.jsonl"), "nowhere.jsonl"),
        (dict(embeddings="nowhere"), "nowhere"),
        (dict(precision="fp16"), "fp16"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence_and_exit_status_2(tiny_settings, settings, sentence):
    """No traceback reaches the user, and nothing is trained."""
    done = run("train.py", tiny_settings | settings)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and sentence in line


@pytest.mark.parametrize("name", ["cache_dir", "checkpoint_dir"])
def test_a_file_or_dangling_link_in_place_of_a_folder_is_refused(tiny_settings, tmp_path, name):
    """The sentence says what is in the way; for a link, that Drive is not mounted."""
    in_the_way = tmp_path / "file"
    in_the_way.write_text("keep me")
    with pytest.raises(UserError, match="is a file"):
        train.main(ResidualConfig(**tiny_settings | {name: str(in_the_way)}))
    assert in_the_way.read_text() == "keep me"
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="mount Drive first"):
        train.main(ResidualConfig(**tiny_settings | {name: str(link)}))


def test_checkpoints_may_lie_behind_a_link(tiny_settings, tmp_path):
    """A link to a folder is used and stays a link."""
    (tmp_path / "drive").mkdir()
    link = tmp_path / "checkpoints"
    link.symlink_to(tmp_path / "drive")
    train.main(ResidualConfig(**tiny_settings, phase="1"))
    assert link.is_symlink() and (tmp_path / "drive" / "model_latest.pt").exists()


def test_an_interrupted_download_of_pretrained_embeddings_is_no_random_matrix(tiny_settings, monkeypatch):
    """`--embeddings gpt2` without the hub stops with a sentence."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", unreachable)
    with pytest.raises(UserError, match="embeddings 'gpt2' cannot be had"):
        train.main(ResidualConfig(**tiny_settings, embeddings="gpt2"))


def test_whitening_what_still_changes_is_refused(tiny_settings):
    """Said before anything is read or written."""
    with pytest.raises(UserError, match="use --freeze_context"):
        train.main(ResidualConfig(**tiny_settings, whiten_context=True))


def test_batches_of_one_sample_work(tiny_settings):
    """The smallest batch there is, in both phases, as a command."""
    settings = tiny_settings | {"phase1_batch_size": 1, "phase2_batch_size": 1}
    done = run("train.py", settings)
    assert done.returncode == 0, done.stderr
    block = dict(line.split(": ", 1) for line in done.stdout.split("\n---\n")[1].splitlines())
    assert (block["phase1_steps"], block["phase2_steps"]) == ("36", "36")
