"""Several runs in one folder: each is what its settings and data say, and equal stages are made once."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
from helpers import stop_after
from kills import assert_equal

import train
from config import ResidualConfig
from newllm.errors import UserError
from newllm.report.record import find_records, read_record, read_status
from newllm.saving import runs
from newllm.saving.files import load_sealed
from scripts import report

OTHER = dict(
    untrained_control=False, phase1_convergence_threshold=0.1, phase1_min_converged_ratio=0.5,
    phase1_max_iterations=2, phase1_learning_rate=0.01, phase1_batch_size=2, dist_reg="covariance",
    dist_reg_weight=0.5, context_noise=0.1, min_batches=2, grad_clip=0.5, phase2_epochs=8,
    phase2_learning_rate=0.01, phase2_batch_size=2, dropout=0.1, warmup_ratio=0.5, patience=1,
    weight_decay=0.2, label_smoothing=0.3, teachers="a.pth", context_lr_scale=0.5, gradient_sweeps=1,
    token_dropout=0.1,
    freeze_context=True,
    context_adapter="lora", adapter_rank=2, whiten_context=True, phase1_shuffle=True, seed=7, num_samples=7,
    context_dim=12, vocab_size=280, max_seq_length=15, init_scale=0.4,
    retrieval="ngram", retrieval_keys="tokens", retrieval_window=9,
)  # fmt: skip
COUNTED = "ngrams contexts counting by_contexts"
UNTRAINED = "ngrams contexts head counting by_contexts retrieval"
TAKEN = {  # settings that differ -> what of the first run is taken
    "phase2_learning_rate": f"{COUNTED} phase1", "dropout": f"{COUNTED} phase1",
    "whiten_context": f"{COUNTED} phase1", "untrained_control": f"{COUNTED} phase1 phase2",
    "context_lr_scale": f"{UNTRAINED} phase1", "freeze_context": f"{UNTRAINED} phase1",
    "dist_reg_weight": UNTRAINED,
    "phase1_convergence_threshold": "ngrams head counting by_contexts retrieval",
    "min_batches": COUNTED, "init_scale": "ngrams counting", "seed": "", "num_samples": "", "vocab_size": "",
    **dict.fromkeys(["retrieval", "retrieval_keys", "retrieval_window"],
                    "ngrams contexts head phase1 phase2"),
}  # fmt: skip


def latest(config, *below):
    return load_sealed(Path(config.checkpoint_dir, *below, "model_latest.pt"))


def with_(config, **changes):
    return dataclasses.replace(config, **changes)


def assert_as_alone(config):
    """The run ended as one in a folder of its own does."""
    lone = with_(config, checkpoint_dir=f"{config.checkpoint_dir}_{len(os.listdir(config.checkpoint_dir))}")
    train.main(lone)
    assert_equal(Path(config.checkpoint_dir), Path(lone.checkpoint_dir))


@pytest.fixture(scope="module")
def complete(tmp_path_factory, corpus_file):
    """Configuration of a complete run with its untrained row."""
    folder = tmp_path_factory.mktemp("complete")
    config = ResidualConfig(
        data_source=str(corpus_file), tokenizer="bpe", vocab_size=300, num_samples=6, val_samples=4,
        max_seq_length=16, context_dim=8, embed_dim=8, num_layers=1, phase1_max_iterations=1, phase2_epochs=2,
        min_batches=3, precision="fp32", device="cpu", artifacts=False, cache_dir=str(folder / "cache"),
        checkpoint_dir=str(folder / "checkpoints"),
    )  # fmt: skip
    train.main(config)
    return config


@pytest.fixture
def folder(complete, tmp_path):
    """A copy of the complete run: its configuration there."""
    shutil.copytree(complete.checkpoint_dir, tmp_path / "checkpoints")
    return with_(complete, checkpoint_dir=str(tmp_path / "checkpoints"))


# Which run it is


def test_every_setting_that_shapes_a_figure_makes_another_run(complete):
    """It is named with both values; so do other data. A new setting needs an entry here."""
    state = latest(complete)
    for name, value in OTHER.items():
        difference = runs.distinction(state, with_(complete, **{name: value}), state["data_fingerprint"])
        assert difference == f"{name} {getattr(complete, name)!r} -> {value!r}"
    of_stages = {name for name, marks in runs.SHAPES.items() if marks and not runs.WHOLE & set(marks)}
    assert set(OTHER) >= of_stages
    assert "other data" in runs.distinction(state, complete, "another fingerprint")


def test_where_and_how_it_runs_may_change_after_the_end(folder, capsys):
    """The block again, status complete, no word of changed settings, not a byte written."""
    others = dict(save_every_n_batches=7, keep_last=1, val_quick_every_n_batches=0, context_memory_mb=0)
    first, before = latest(folder), Path(folder.checkpoint_dir, "model_latest.pt").read_bytes()
    loss = train.main(with_(folder, phase="1", **others))["val_loss"]
    assert loss == first["results"]["phase2"]["head"]["loss"]
    assert Path(folder.checkpoint_dir, "model_latest.pt").read_bytes() == before
    assert "settings changed" not in capsys.readouterr().out
    assert read_status(folder.checkpoint_dir)["state"] == "complete"


def test_what_is_ahead_may_change(tiny_settings, capsys):
    """With a warning. What shaped Phase 1, or the stage in hand, makes another run; a batch size does not."""
    config = ResidualConfig(**tiny_settings, phase="1", untrained_control=False)
    train.main(config)
    found, both = latest(config), with_(config, phase="both")
    same = found["data_fingerprint"]
    assert runs.distinction(found, with_(both, phase1_learning_rate=0.01), same)
    assert runs.distinction(found, with_(config, min_batches=2), same)  # nothing is left to be made with it
    later = dict(token_dropout=0.1, phase2_batch_size=3, min_batches=2, freeze_context=True)
    capsys.readouterr()
    stop_after(with_(both, **later), 3)
    lines = capsys.readouterr().out.splitlines()
    (warning,) = (line for line in lines if line.startswith("warning: settings changed"))
    assert all(f"{name} " in warning for name in later) and "what is done stays" in warning
    found, later = latest(config), with_(both, **later)
    assert found["stage"] == "phase2" and found["position"]
    assert not runs.distinction(found, with_(later, phase2_batch_size=2), same)
    assert "phase2_epochs 3 -> 1" in runs.distinction(found, with_(later, phase2_epochs=1), same)


# Several of them


def test_three_rates_in_one_folder_are_three_runs(folder, capsys):
    """Each ends as in a folder of its own, keeps its record, and is found again by its settings."""
    first = latest(folder)["run_id"]
    for rate in (0.003, 0.004):
        config = with_(folder, phase2_learning_rate=rate)
        capsys.readouterr()
        assert train.main(config)["val_loss"] == latest(config)["results"]["phase2"]["head"]["loss"]
        said = capsys.readouterr().out
        assert f"phase2_learning_rate {0.001 if rate == 0.003 else 0.003} -> {rate}); run " in said
        assert "Phase 1 (of run " in said and said.count("(of run ") == 1 and "== Phase 1" not in said
        assert_as_alone(config)
    second = latest(folder)["run_id"]
    assert len(find_records(folder.checkpoint_dir)) == 3
    capsys.readouterr()
    train.main(folder)
    assert latest(folder)["run_id"] == first and f"back to run {first}" in capsys.readouterr().out
    assert latest(folder, "runs", second)["config"]["phase2_learning_rate"] == 0.004
    assert read_status(Path(folder.checkpoint_dir, "runs", second))["state"] == "complete"
    rows = {tuple(read_record(path).phase1.get("cvfp", [])) for path in find_records(folder.checkpoint_dir)}
    assert len(rows) == 1 and all(rows)  # taken over with the weights


def test_stages_of_equal_settings_are_taken(complete):
    """And only those; with load_checkpoint off, or of other data, none."""
    state = latest(complete)

    def taken(config, fingerprint=state["data_fingerprint"]):
        choice = runs.choose(complete.checkpoint_dir, state, config, fingerprint)
        assert ("phase1" in choice.stages) == ("Phase 1" in choice.lines[-1].partition("taken over: ")[2])
        return " ".join([*choice.reused, *choice.stages])

    for name, parts in TAKEN.items():
        changed = with_(complete, **{name: OTHER[name]})
        assert taken(changed) == parts, name
        assert taken(with_(changed, load_checkpoint=False)) == taken(changed, "other") == ""


def test_what_is_taken_is_what_would_have_been_made(folder, capsys):
    """Weights, histories and results; also by a run that was stopped before the stage it takes."""
    config = with_(folder, phase2_epochs=3, untrained_control=False)
    train.main(config)
    assert_as_alone(config)
    config = with_(folder, phase2_learning_rate=0.003)
    stop_after(config, 2)
    assert latest(config)["stage"] == "untrained"
    capsys.readouterr()
    train.main(config)
    assert "== Phase 1" not in capsys.readouterr().out
    assert_as_alone(config)


def test_phase1_brings_the_frozen_tensors_of_its_run(folder, capsys):
    """Of another Phase 1 than the newest run's, with its embedding's copy: it lies beside the top by then."""
    for changes in (dict(freeze_context=True, phase1_learning_rate=0.01), dict(init_scale=0.4)):
        train.main(with_(folder, untrained_control=False, **changes))
    capsys.readouterr()
    config = with_(folder, untrained_control=False, phase1_learning_rate=0.01)
    train.main(config)
    assert "== Phase 1" not in capsys.readouterr().out
    assert_as_alone(config)


def test_load_checkpoint_off_begins_anew_and_parks(folder):
    """Twice: three runs of the same settings, each with an id of its own, and none has taken anything."""
    for _ in range(2):
        train.main(with_(folder, load_checkpoint=False, phase="1", untrained_control=False))
    assert len(list(Path(folder.checkpoint_dir, "runs").iterdir())) == 2
    assert [len(read_record(path).phase1["cvfp"]) for path in find_records(folder.checkpoint_dir)] == [1] * 3
    assert runs.unused_id(Path(folder.checkpoint_dir), latest(folder)["run_id"]).endswith("_2")


def test_without_saving_the_folder_is_only_read(folder):
    """Another run takes what it can, one that is parked is continued where it lies, and nothing moves."""
    train.main(with_(folder, phase2_learning_rate=0.003))
    before = {path: path.read_bytes() for path in Path(folder.checkpoint_dir).rglob("*.pt")}
    train.main(with_(folder, save_checkpoint=False))
    train.main(with_(folder, save_checkpoint=False, context_lr_scale=0.3))
    assert {path: path.read_bytes() for path in Path(folder.checkpoint_dir).rglob("*.pt")} == before


def test_a_damaged_run_beside_the_top(folder, capsys):
    """It comes back from the state before; where no file is whole a line says so, and the files stay."""
    first = latest(folder)["run_id"]
    other = with_(folder, phase="1", phase1_learning_rate=0.01, untrained_control=False)
    train.main(other)
    Path(folder.checkpoint_dir, "runs", first, "model_latest.pt").write_bytes(b"torn")
    assert train.main(folder)["run_id"] == first == latest(folder)["run_id"]
    (second,) = Path(folder.checkpoint_dir, "runs").iterdir()
    for path in second.glob("model_*.pt"):
        path.write_bytes(b"torn")
    train.main(other)
    assert f"{second} holds no run that this version can read" in capsys.readouterr().out
    assert (second / "model_latest.pt").read_bytes() == b"torn"


# What a person sees of them


def test_report_lists_the_runs_and_removes_one(folder, capsys):
    """Id, state, figure, size, what differs; the run at the top stays, and the record of a removed one."""
    first = latest(folder)["run_id"]
    stop_after(with_(folder, seed=3, untrained_control=False), 2)
    second = latest(folder)["run_id"]
    where = ["--checkpoint_dir", folder.checkpoint_dir]
    capsys.readouterr()
    report.main(["--runs", *where])
    _, _, one, two = capsys.readouterr().out.splitlines()
    assert one.startswith(second) and "in Phase 1" in one and "(at the top)" in one
    assert two.startswith(first) and "at its end" in two and "seed 3 -> 42" in two
    assert f"{latest(folder, 'runs', first)['results']['phase2']['head']['ppl']:.1f}" in two
    for wrong in (second, "nothing", "../checkpoints", ""):
        with pytest.raises(UserError, match=r"the one at the top of \S+ stays"):
            runs.remove(folder.checkpoint_dir, wrong)
    with pytest.raises(UserError, match="no run lies in"):
        report.main(["--runs", "--checkpoint_dir", f"{folder.checkpoint_dir}/nowhere"])
    report.main(["--remove", first, *where])
    assert f"run {first} is deleted" in capsys.readouterr().out
    assert not list(Path(folder.checkpoint_dir, "runs").iterdir())
    assert len(find_records(folder.checkpoint_dir)) == 2


def test_second_copies_hold_all_runs_and_bring_them_back(folder, tmp_path):
    """A lost folder comes back whole; copies of another run are not overwritten, but come beside this one."""
    mirror = tmp_path / "mirror"
    first = latest(folder)["run_id"]
    other = with_(folder, phase="1", phase1_learning_rate=0.01, untrained_control=False)
    other = with_(other, backup_dir=str(mirror))
    train.main(other)
    second, parked = latest(folder)["run_id"], Path(folder.checkpoint_dir, "runs", first)
    before = {path.name: path.read_bytes() for path in parked.glob("model_*.pt")}
    shutil.rmtree(folder.checkpoint_dir)
    notes = []
    Path(folder.checkpoint_dir).mkdir()
    runs.fetch(Path(folder.checkpoint_dir), mirror, notes)
    assert latest(folder)["run_id"] == second and len(notes) == 2
    assert {path.name: path.read_bytes() for path in parked.glob("model_*.pt")} == before
    stranger = with_(other, checkpoint_dir=f"{folder.checkpoint_dir}_2", seed=5)
    train.main(stranger)
    assert latest(stranger, "runs", second)["run_id"] == second
    copies = with_(folder, checkpoint_dir=str(mirror))
    assert latest(copies, "runs", second)["run_id"] == second and latest(copies)["config"]["seed"] == 5
