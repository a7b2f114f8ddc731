"""Several runs in one folder: each is what its settings and data say, none is lost, and equal stages are made once."""

import dataclasses
import itertools
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import stop_after, write_dialogues
from kills import assert_equal

import train
from config import ResidualConfig
from newllm.errors import UserError
from newllm.report.record import find_records, read_record, read_status
from newllm.saving import runs
from newllm.saving.checkpoint import recover, write_state
from newllm.saving.files import load_sealed, save_sealed
from newllm.saving.trained import open_model
from scripts import report

OTHER = dict(
    untrained_control=False, phase1_convergence_threshold=0.1, phase1_min_converged_ratio=0.5, phase1_max_iterations=2,
    phase1_learning_rate=0.01, phase1_batch_size=2, dist_reg="covariance", dist_reg_weight=0.5, context_noise=0.1,
    min_batches=2, grad_clip=0.5, phase2_epochs=8, phase2_learning_rate=0.01, phase2_batch_size=2, dropout=0.1,
    warmup_ratio=0.5, patience=1, weight_decay=0.2, context_lr_scale=0.5, gradient_sweeps=1, token_dropout=0.1,
    freeze_context=True, context_adapter="lora", adapter_rank=2, whiten_context=True, phase1_shuffle=True, seed=7,
    num_samples=7, context_dim=12, vocab_size=280, max_seq_length=15, init_scale=0.4,
)  # fmt: skip
TAKEN = {  # settings that differ -> what of the first run is taken
    "phase2_learning_rate": "ngrams contexts phase1", "dropout": "ngrams contexts phase1",
    "whiten_context": "ngrams contexts phase1", "untrained_control": "ngrams contexts phase1",
    "context_lr_scale": "ngrams contexts head phase1", "freeze_context": "ngrams contexts head phase1",
    "dist_reg_weight": "ngrams contexts head", "phase1_convergence_threshold": "ngrams head", "min_batches": "ngrams contexts",
    "init_scale": "ngrams", "seed": "", "num_samples": "", "vocab_size": "",
}  # fmt: skip


def latest(config, *below):
    return load_sealed(Path(config.checkpoint_dir, *below, "model_latest.pt"))


def with_(config, **changes):
    return dataclasses.replace(config, **changes)


def alone(config):
    """The same run in a folder of its own."""
    lone = with_(config, checkpoint_dir=f"{config.checkpoint_dir}_alone_{len(config.given)}")
    train.main(lone)
    return lone


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


@pytest.fixture
def folder(complete, tmp_path):
    """A copy of the complete run: its configuration there."""
    shutil.copytree(complete.checkpoint_dir, tmp_path / "checkpoints")
    return with_(complete, checkpoint_dir=str(tmp_path / "checkpoints"))


# Which run it is


@pytest.mark.parametrize("name", OTHER)
def test_a_complete_run_is_not_printed_under_other_settings(complete, name):
    """Every setting that shapes a figure makes another run, and is named with both values; so do other data."""
    state, changed = latest(complete), with_(complete, **{name: OTHER[name]})
    difference = runs.distinction(state, changed, state["data_fingerprint"])
    assert difference == f"{name} {getattr(complete, name)!r} -> {OTHER[name]!r}"
    assert set(OTHER) >= {
        name for name, marks in runs.SHAPES.items() if marks and not runs.WHOLE & set(marks)
    }
    assert "other data" in runs.distinction(state, complete, "another fingerprint")


def test_where_and_how_it_runs_may_change_after_the_end(folder, capsys):
    """The block again, status complete, not a word of changed settings; the record keeps those that the run was made with."""
    others = dict(save_every_n_batches=7, keep_last=1, val_quick_every_n_batches=0, context_memory_mb=0)
    first, before = latest(folder), Path(folder.checkpoint_dir, "model_latest.pt").read_bytes()
    loss = train.main(with_(folder, phase="1", **others))["val_loss"]
    assert loss == first["results"]["phase2"]["head"]["loss"]
    assert Path(folder.checkpoint_dir, "model_latest.pt").read_bytes() == before
    assert "settings changed" not in capsys.readouterr().out
    assert read_status(folder.checkpoint_dir)["state"] == "complete"
    (record,) = find_records(folder.checkpoint_dir)
    assert (
        read_record(record).config["keep_last"] == folder.keep_last != 1 and read_record(record).sessions > 1
    )


def test_between_the_phases_what_is_ahead_may_change(tiny_settings, capsys):
    """With a warning; what shaped Phase 1, or an epoch of the stage in hand, makes another run, and a batch size does not."""
    config = ResidualConfig(**tiny_settings, phase="1", untrained_control=False)
    train.main(config)
    found, both = latest(config), with_(config, phase="both")
    same = found["data_fingerprint"]
    assert runs.distinction(found, with_(both, phase1_learning_rate=0.01), same)
    assert runs.distinction(found, with_(config, min_batches=2), same)  # nothing is left to be made with it
    later = dict(
        token_dropout=0.1, phase2_batch_size=3, min_batches=2, phase2_learning_rate=0.01, freeze_context=True
    )
    capsys.readouterr()
    stop_after(with_(both, **later), 3)
    printed = capsys.readouterr().out.splitlines()
    (warning,) = (line for line in printed if line.startswith("warning: settings changed"))
    assert all(f"{name} " in warning for name in later) and "what is done stays" in warning
    found = latest(config)
    assert found["stage"] == "phase2" and found["position"]
    later = with_(both, **later)
    assert not runs.distinction(found, with_(later, phase2_batch_size=2), same)
    assert "phase2_epochs 3 -> 1" in runs.distinction(found, with_(later, phase2_epochs=1), same)
    assert found["made"]["phase1"] and latest(config)["made"]["phase2"]
    stop_after(with_(later, min_batches=4), 1)
    assert latest(config)["made"]["phase2"] == {}  # made with several: for nobody else to take


# Several of them


def test_three_rates_in_one_folder_are_three_runs(folder, capsys):
    """A loop in a notebook: each ends as in a folder of its own, keeps its record, and is found again by its settings."""
    rates = [with_(folder, phase2_learning_rate=rate) for rate in (0.003, 0.004)]
    first = latest(folder)["run_id"]
    for config in rates:
        assert train.main(config)["val_loss"] == latest(config)["results"]["phase2"]["head"]["loss"]
        assert_equal(Path(config.checkpoint_dir), Path(alone(config).checkpoint_dir))
    said = capsys.readouterr().out
    assert (
        f"another run than {first} (phase2_learning_rate 0.001 -> 0.003); run {first} is kept whole" in said
    )
    assert (
        "Phase 1 (of run " in said and "== Phase 1" not in said.split("another run than")[1].split("---")[0]
    )
    second = latest(folder)["run_id"]
    assert len(find_records(folder.checkpoint_dir)) == 3
    train.main(folder)
    assert latest(folder)["run_id"] == first and f"back to run {first}" in capsys.readouterr().out
    assert latest(folder, "runs", second)["config"]["phase2_learning_rate"] == 0.004
    assert read_status(Path(folder.checkpoint_dir, "runs", second))["state"] == "complete"
    rows = {tuple(read_record(path).phase1.get("cvfp", [])) for path in find_records(folder.checkpoint_dir)}
    assert len(rows) == 1 and all(rows)  # taken over with the weights


@pytest.mark.parametrize("name", TAKEN)
def test_stages_of_equal_settings_are_taken(complete, name):
    """And only those; with load_checkpoint off, on another device or precision, or by another torch, none."""
    state, changed = latest(complete), with_(complete, **{name: OTHER[name]})
    data = state["data_fingerprint"]

    def taken(config, found=state, fingerprint=data):
        return " ".join(runs.choose(complete.checkpoint_dir, found, config, fingerprint).taken)

    assert taken(changed) == TAKEN[name]
    made = {stage: settings | {"torch": "1.0"} for stage, settings in state["made"].items()}
    for nothing in (
        taken(with_(changed, load_checkpoint=False)),
        taken(with_(changed, precision="bf16")),
        taken(changed, state | {"made": made}),
        taken(
            changed, {key: value for key, value in state.items() if key != "made"}
        ),  # of an earlier version
        taken(changed, fingerprint="other"),
    ):
        assert nothing == ""


@pytest.mark.parametrize(
    "changes", [dict(freeze_context=True), dict(phase2_epochs=3, untrained_control=False)], ids=str
)
def test_what_is_taken_is_what_would_have_been_made(folder, changes):
    """Weights, histories and results of the run are those of one that has trained all of it."""
    config = with_(folder, **changes)
    train.main(config)
    assert_equal(Path(config.checkpoint_dir), Path(alone(config).checkpoint_dir))


def test_a_run_stopped_before_the_stage_it_takes_still_takes_it(folder, capsys):
    """The head on untrained contexts is trained in two sessions, Phase 1 in none."""
    config = with_(folder, phase2_learning_rate=0.003)
    stop_after(config, 2)
    assert latest(config)["stage"] == "untrained"
    train.main(config)
    assert "== Phase 1" not in capsys.readouterr().out
    assert_equal(Path(config.checkpoint_dir), Path(alone(config).checkpoint_dir))


def test_load_checkpoint_off_begins_anew_and_parks(folder):
    """Twice: three runs of the same settings, none of which has taken anything."""
    for _ in range(2):
        train.main(with_(folder, load_checkpoint=False, phase="1", untrained_control=False))
    assert len(list(Path(folder.checkpoint_dir, "runs").iterdir())) == 2
    assert [len(read_record(path).phase1["cvfp"]) for path in find_records(folder.checkpoint_dir)] == [1] * 3


def test_other_text_is_another_run(tiny_settings, tmp_path):
    """The same settings with another content of the file; the earlier run comes back with the text."""
    source = write_dialogues(tmp_path / "own.jsonl", 30)
    config = ResidualConfig(
        **tiny_settings | {"data_source": str(source)}, phase="1", untrained_control=False
    )
    first = train.main(config)
    write_dialogues(source, 30, seed=1)
    assert train.main(config)["run_id"] != first["run_id"]
    write_dialogues(source, 30)
    assert train.main(config)["run_id"] == first["run_id"]


def test_without_saving_the_folder_is_only_read(folder):
    """Another run beside it takes what it can, one that is parked is continued where it lies, and nothing moves."""
    train.main(with_(folder, phase2_learning_rate=0.003))
    before = {path: path.read_bytes() for path in Path(folder.checkpoint_dir).rglob("*.pt")}
    train.main(with_(folder, save_checkpoint=False))
    train.main(with_(folder, save_checkpoint=False, context_lr_scale=0.3))
    assert {path: path.read_bytes() for path in Path(folder.checkpoint_dir).rglob("*.pt")} == before


# What is damaged


def test_a_parked_run_whose_latest_is_damaged_comes_back_from_the_one_before(folder, capsys):
    """It is set aside; where no file of a parked run is whole a line says so, and the files stay."""
    first = latest(folder)["run_id"]
    other = with_(folder, phase="1", phase1_learning_rate=0.01, untrained_control=False)
    train.main(other)
    home = Path(folder.checkpoint_dir, "runs", first)
    (home / "model_latest.pt").write_bytes(b"torn")
    assert train.main(folder)["run_id"] == first
    assert (Path(folder.checkpoint_dir) / "model_latest.pt").stat().st_size > 1000
    second = next(Path(folder.checkpoint_dir, "runs").iterdir())
    for path in second.glob("model_*.pt"):
        path.write_bytes(b"torn")
    train.main(other)
    assert f"{second} holds no run that this version can read" in capsys.readouterr().out
    assert (second / "model_latest.pt").read_bytes() == b"torn"


class Killed(BaseException):
    """Stands for a kill."""


def state_of(run, number, folder):
    """A small whole state of a run in a folder, with files beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {"epoch": "", "stage": "phase1", "step": number, "restart": "", "saved_at": "now"}
    for save in (number, number + 1):
        write_state(folder, told | {"run_id": run, "save_number": save}, 2, ["model_phase1.pt"])
    for name in ("model_best.pt", "model_frozen_1.pt"):
        save_sealed({"run_id": run}, folder / name)
    for name in ("contexts_0_0_fp32.bin", "contexts_0_1_fp32.bin"):
        (folder / name).write_text(run)


def content(folder):
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".json"
    }


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
@pytest.mark.parametrize("back", [True, False], ids=["back", "new"])
def test_a_change_of_runs_killed_at_any_operation_loses_nothing(tmp_path, monkeypatch, back, links):
    """Before each operation that changes a file: the top is whole, and the next start has both runs, byte for byte."""
    state_of("A", 5, tmp_path / "A")
    state_of("B", 3, tmp_path / "B")
    (tmp_path / "B" / "model_epoch.pt").write_bytes((tmp_path / "B" / "model_prev.pt").read_bytes())
    whole = {run: content(tmp_path / run) for run in "AB"}

    def change(folder):
        runs.settle(folder)
        runs.park(folder, "A")
        if back:
            runs.bring_up(folder, "B")

    operations = "replace", "link", "mkdir", "rmdir", "unlink"
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "no links")))
        operations = "replace", "mkdir", "rmdir", "unlink", "fsync"
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "A", folder)
        shutil.copytree(tmp_path / "B", folder / "runs" / "B")
        left = iter(range(number, 0, -1))

        def dying(real, left=left):
            def operation(*arguments, **named):
                if next(left, 0) == 1:
                    raise Killed
                return real(*arguments, **named)

            return operation

        with monkeypatch.context() as patch:
            for name in operations:
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                change(folder)
                ended = next(left, 0) > 0
            except Killed:
                ended = False
        top = load_sealed(folder / "model_latest.pt")["run_id"]
        assert runs.settle(folder)[0]["run_id"] == top
        if ended:
            assert top == ("B" if back else "A") and number > 10
            break
        for stray in folder.rglob(".*.tmp"):
            stray.unlink()
        places = {
            "A": folder if top == "A" else folder / "runs" / "A",
            "B": folder if top == "B" else folder / "runs" / "B",
        }
        for run, place in places.items():
            assert content(place) == whole[run], (number, run)


# What a person sees of them


def test_report_lists_the_runs_and_removes_one(folder, capsys):
    """Id, state, figure, size, last save and what differs; the one at the top stays; the record of a removed one too."""
    first = latest(folder)["run_id"]
    stop_after(with_(folder, seed=3, untrained_control=False), 2)
    second = latest(folder)["run_id"]
    where = ["--checkpoint_dir", folder.checkpoint_dir]
    capsys.readouterr()
    report.main(["--runs", *where])
    _, _, one, two = capsys.readouterr().out.splitlines()
    assert one.startswith(second) and "in Phase 1" in one and "(at the top)" in one
    assert two.startswith(first) and "complete" in two and "seed 3 -> 42" in two and len(two.split("|")) == 6
    assert f"{latest(folder, 'runs', first)['results']['phase2']['head']['ppl']:.1f}" in two
    for wrong in (second, "nothing", "../checkpoints", ""):
        with pytest.raises(UserError, match="is in use: it stays"):
            runs.remove(folder.checkpoint_dir, wrong)
    report.main(["--remove", first, *where])
    said = capsys.readouterr().out
    assert "MB freed" in said and f"run {first} is deleted" in said and len(said.splitlines()) == 4
    assert (
        not list(Path(folder.checkpoint_dir, "runs").iterdir())
        and len(find_records(folder.checkpoint_dir)) == 2
    )


def test_a_parked_run_is_read_from_its_folder(folder):
    """Its model, and its status; the one at the top as ever."""
    first = latest(folder)["run_id"]
    train.main(with_(folder, phase="1", phase1_learning_rate=0.01))
    model, _, found = open_model(Path(folder.checkpoint_dir, "runs", first))
    assert found["run_id"] == first
    best = load_sealed(Path(folder.checkpoint_dir, "runs", first, "model_best.pt"))["model_state_dict"]
    assert all(torch.equal(best[name], tensor) for name, tensor in model.trained_state().items())
    assert open_model(folder.checkpoint_dir)[2]["run_id"] != first


def test_second_copies_hold_all_runs_and_bring_them_back(folder, tmp_path):
    """A lost folder comes back whole; another run's newer copies come beside this one's, and none is overwritten."""
    mirror = tmp_path / "mirror"
    first = latest(folder)["run_id"]
    other = with_(
        folder, phase="1", phase1_learning_rate=0.01, untrained_control=False, backup_dir=str(mirror)
    )
    train.main(other)
    second = latest(folder)["run_id"]
    assert latest(with_(folder, checkpoint_dir=str(mirror)), "runs", first)["run_id"] == first
    before = {p.name: p.read_bytes() for p in Path(folder.checkpoint_dir, "runs", first).glob("model_*.pt")}
    shutil.rmtree(folder.checkpoint_dir)
    notes = []
    Path(folder.checkpoint_dir).mkdir()
    recover(Path(folder.checkpoint_dir), mirror, notes)
    assert latest(folder)["run_id"] == second and len(notes) == 2
    assert {
        p.name: p.read_bytes() for p in Path(folder.checkpoint_dir, "runs", first).glob("model_*.pt")
    } == before
    stranger = with_(other, checkpoint_dir=f"{folder.checkpoint_dir}_2", seed=5)
    train.main(stranger)
    assert latest(stranger, "runs", second)["run_id"] == second
    copies = with_(folder, checkpoint_dir=str(mirror))
    assert latest(copies, "runs", second)["run_id"] == second and latest(copies)["config"]["seed"] == 5


def test_a_run_id_is_given_once(folder):
    """Also to runs of the same second."""
    run_id, place = latest(folder)["run_id"], Path(folder.checkpoint_dir)
    assert runs.unused_id(place, run_id) == f"{run_id}_2"
    runs.park(place, run_id)
    shutil.rmtree(place / find_records(place)[0].parts[-3])
    assert runs.unused_id(place, run_id) == f"{run_id}_2"
