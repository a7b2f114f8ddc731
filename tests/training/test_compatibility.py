"""Which settings shape what, and that no figure is printed under settings that it was not made with."""

import dataclasses
from pathlib import Path

import pytest
from helpers import run, stop_after

import train
from config import ResidualConfig
from newllm.config import Config, settings_of
from newllm.errors import UserError
from newllm.report.record import find_records, read_record, read_status
from newllm.saving.compatibility import SHAPES
from newllm.saving.files import load_sealed, save_sealed

# Said a second time, setting by setting: u the untrained row, c the head on it, 1 and 2 the phases, * the whole run,
# n another run beside it, - nothing but where and how.
MARKS = dict(
    preset="*", data_source="*", data_split="*", data_column="*", tokenizer="*", vocab_size="*", num_samples="n",
    num_tokens="n", max_seq_length="*", val_samples="*", tune_share="*", cache_dir="-", model_type="*", context_dim="*",
    embed_dim="*", num_layers="*", token_layers="*", tie_weights="*", embeddings="*", init_scale="*", phase="-",
    phase1_max_iterations="1", phase1_shuffle="*", phase1_convergence_threshold="u1", phase1_min_converged_ratio="u1",
    phase1_learning_rate="1", phase1_batch_size="1", dist_reg="1", dist_reg_weight="1", context_noise="1",
    phase2_epochs="c2", phase2_learning_rate="c2", phase2_batch_size="c2", untrained_control="u", freeze_context="*",
    whiten_context="*", context_lr_scale="2", context_adapter="*", adapter_rank="*", gradient_sweeps="2", dropout="c2",
    token_dropout="2", warmup_ratio="c2", patience="c2", val_quick_frac="-", val_quick_every_n_batches="-",
    min_batches="c12", weight_decay="c2", grad_clip="c12", device="-", precision="-", context_memory_mb="-", compile="-",
    attention="-", gpu_memory_fraction="-", seed="*", save_checkpoint="-", load_checkpoint="-", checkpoint_dir="-",
    save_every_n_batches="-", save_min_seconds="-", save_every_minutes="-", keep_last="-", backup_dir="-", backup_every_minutes="-",
    max_minutes="-", artifacts="-", trackers="-",
)  # fmt: skip
LETTERS = {
    "data": "*",
    "model": "*",
    "budget": "n",
    "untrained": "u",
    "control": "c",
    "phase1": "1",
    "phase2": "2",
}
OTHER = dict(
    untrained_control=False, phase1_convergence_threshold=0.1, phase1_min_converged_ratio=0.5, phase1_max_iterations=2,
    phase1_learning_rate=0.01, phase1_batch_size=2, dist_reg="covariance", dist_reg_weight=0.5, context_noise=0.1,
    min_batches=2, grad_clip=0.5, phase2_epochs=8, phase2_learning_rate=0.01, phase2_batch_size=2, dropout=0.1,
    warmup_ratio=0.5, patience=1, weight_decay=0.2, context_lr_scale=0.5, gradient_sweeps=1, token_dropout=0.1,
)  # fmt: skip


def files(config):
    """Content of all that a run has written, but for the marks of who reads it."""
    return {
        path: path.read_bytes()
        for path in Path(config.checkpoint_dir).rglob("*")
        if path.is_file() and path.name not in ("run.lock", "status.json")
    }


def refused(config, **changes):
    """The sentence with which a run of changed settings is refused; nothing is touched."""
    before = files(config)
    with pytest.raises(UserError) as caught:
        train.main(dataclasses.replace(config, **changes))
    assert files(config) == before
    return str(caught.value)


def test_every_setting_says_what_it_shapes():
    """As the table here has it; one without a mark is missed, and one that is gone is too."""
    assert {name: "".join(map(LETTERS.get, marks)) or "-" for name, marks in SHAPES.items()} == MARKS
    assert set(SHAPES) == set(settings_of(Config))


def test_every_setting_that_shapes_a_stage_is_tried_below():
    """The table of other values is complete."""
    assert set(OTHER) == {name for name, marks in MARKS.items() if not set(marks) & set("*n-")}


@pytest.fixture(scope="module")
def complete(tmp_path_factory, corpus_file):
    """Configuration of a complete run with its untrained row."""
    folder = tmp_path_factory.mktemp("complete")
    config = ResidualConfig(
        data_source=str(corpus_file), tokenizer="bpe", vocab_size=300, num_samples=6, val_samples=4, max_seq_length=16,
        context_dim=8, embed_dim=8, num_layers=1, phase1_max_iterations=1, phase2_epochs=2, min_batches=3, precision="fp32", device="cpu",
        artifacts=False, cache_dir=str(folder / "cache"), checkpoint_dir=str(folder / "checkpoints"),
    )  # fmt: skip
    train.main(config)
    return config


@pytest.mark.parametrize("name", OTHER)
def test_a_complete_run_is_not_printed_under_other_settings(complete, name):
    """The sentence has the setting, both values and what to do."""
    sentence = refused(complete, **{name: OTHER[name]})
    assert f"{name} {getattr(complete, name)!r} -> {OTHER[name]!r}" in sentence
    assert (
        "restore these settings, choose another --checkpoint_dir, or start afresh with --no-load_checkpoint"
        in sentence
    )


def test_as_a_command_it_ends_with_status_2(complete):
    """One line on standard error."""
    done = run("train.py", complete.to_dict() | {"phase2_epochs": 8})
    assert done.returncode == 2 and "val_loss" not in done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and "phase2_epochs 2 -> 8" in line


def test_where_and_how_it_runs_may_change_after_the_end(complete, capsys):
    """The block again, status complete, not a word of changed settings; the record keeps those that the run was made with."""
    others = dict(
        save_every_n_batches=7,
        keep_last=1,
        val_quick_frac=0.5,
        val_quick_every_n_batches=0,
        context_memory_mb=0,
    )
    first = train.main(complete)
    assert train.main(dataclasses.replace(complete, phase="1", **others))["val_loss"] == first["val_loss"]
    assert "settings changed" not in capsys.readouterr().out
    assert read_status(complete.checkpoint_dir)["state"] == "complete"
    (record,) = find_records(complete.checkpoint_dir)
    assert (
        read_record(record).config["keep_last"] == complete.keep_last != 1
        and read_record(record).sessions > 1
    )


@pytest.mark.parametrize("control", [True, False])
def test_between_the_phases_only_what_shaped_what_is_there_is_refused(tiny_settings, control, capsys):
    """Phase 1's settings are; those of Phase 2 too where the untrained row was made with them; a batch size is not."""
    config = ResidualConfig(**tiny_settings, phase="1", untrained_control=control)
    train.main(config)
    both = dataclasses.replace(config, phase="both")
    assert "holds Phase 1 made with other settings" in refused(both, phase1_learning_rate=0.01)
    assert "min_batches 3 -> 2" in refused(config, min_batches=2)  # nothing is left to be made with it
    later = dict(token_dropout=0.1, phase2_batch_size=3, min_batches=2)
    if control:
        for name in ("dropout", "phase2_learning_rate", "phase2_epochs"):
            assert "holds the untrained row made with other settings" in refused(both, **{name: OTHER[name]})
    else:
        later |= dict(dropout=0.1, phase2_learning_rate=0.01)
    capsys.readouterr()
    train.main(dataclasses.replace(both, **later))
    (warning,) = (
        line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: settings changed")
    )
    assert all(f"{name} " in warning for name in later) and "Phase 1 stay those of the old ones" in warning
    (record,) = find_records(config.checkpoint_dir)
    kept = [line for line in read_record(record).warnings if "has no effect" not in line]
    assert kept == [warning] and read_record(record).config["token_dropout"] == 0.1


def test_three_rates_in_one_folder_give_no_figure_twice(tiny_settings):
    """A loop over a setting in a notebook: the second call says what is the matter."""
    config = ResidualConfig(**tiny_settings, untrained_control=False)
    train.main(config)
    for rate in (0.003, 0.004):
        assert f"phase2_learning_rate 0.002 -> {rate}" in refused(config, phase2_learning_rate=rate)


def test_fewer_epochs_than_are_done_are_refused(tiny_settings):
    """In the stage in hand: what has been trained cannot be taken back; as many as are done end it there."""
    config = ResidualConfig(**tiny_settings, untrained_control=False)
    stop_after(config, 9 + 3 + 2)  # within the second epoch of Phase 2
    assert "further in Phase 2 than these settings go (phase2_epochs 3 -> 1)" in refused(
        config, phase2_epochs=1
    )
    train.main(dataclasses.replace(config, phase2_epochs=2))
    state = load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")
    assert len(state["phase2_history"]["val_loss"]) == state["results"]["phase2"]["head"]["epochs"] == 2


def test_a_changed_rate_is_in_effect_in_the_stage_in_hand(tiny_settings):
    """The optimizer goes on with its moments, not with the rate and decay that were saved beside them."""
    config = ResidualConfig(**tiny_settings, untrained_control=False)
    stop_after(config, 2)

    def groups():
        return load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")["stage_state"]["optimizer"][
            "param_groups"
        ]

    changes = dict(phase1_learning_rate=0.01, phase2_learning_rate=0.5, weight_decay=0.7)
    stop_after(dataclasses.replace(config, **changes), 2)
    assert {group["lr"] for group in groups()} == {0.01}
    stop_after(dataclasses.replace(config, **changes), 6)
    stop_after(dataclasses.replace(config, **changes | dict(phase2_learning_rate=0.25)), 3)
    assert {group["peak_lr"] for group in groups()} == {0.25} and 0.7 in {
        group["weight_decay"] for group in groups()
    }


def test_a_control_that_is_switched_off_half_way_leaves_nothing_behind(tiny_settings):
    """Its state is not taken for that of Phase 1: the run ends as one that never had it."""
    config = ResidualConfig(**tiny_settings)
    stop_after(config, 4)
    found = train.main(dataclasses.replace(config, untrained_control=False))
    alone = ResidualConfig(
        **tiny_settings | {"checkpoint_dir": config.checkpoint_dir + "_alone"}, untrained_control=False
    )
    assert found["val_loss"] == train.main(alone)["val_loss"] and "val_ppl_untrained_context" not in found


def test_weights_of_other_settings_are_not_read(tiny_settings):
    """For who only reads, those of the stage in hand count too."""
    from newllm.data.samples import load_data
    from newllm.models.network import LanguageModel
    from newllm.saving.trained import load_trained

    config = ResidualConfig(**tiny_settings, untrained_control=False)
    stop_after(config, 2)
    data = load_data(config)

    def read(**changes):
        model = LanguageModel(config, data.vocab_size)
        return load_trained(dataclasses.replace(config, **changes), model, data.fingerprint)

    assert read(phase2_learning_rate=0.5).startswith("phase1_iteration_1 of run ")
    with pytest.raises(
        UserError, match=r"a part of Phase 1 made with other settings .phase1_learning_rate 0.002 -> 0.01"
    ):
        read(phase1_learning_rate=0.01)
    with pytest.raises(UserError, match="min_batches 3 -> 2"):
        read(min_batches=2)


def test_a_state_of_the_earlier_format_is_refused_with_what_to_do(complete):
    """It counts the place inside an epoch in batches."""
    latest = Path(complete.checkpoint_dir) / "model_latest.pt"
    whole = load_sealed(latest)
    save_sealed(whole | {"format": 3}, latest)
    assert (
        "has format 3, this version continues 4: finish that run with the version that wrote it"
        in refused(complete)
    )
    save_sealed(whole, latest)
