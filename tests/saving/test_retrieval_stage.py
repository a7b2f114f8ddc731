"""The stage that makes what a model looks up: stopped, continued, added, left out, made otherwise."""

import signal
from dataclasses import replace

import pytest
import torch
from helpers import stop_after
from kills import difference
from looking_up import OFF, ON, ROWS, assert_equal, copy_of, kept, latest, retrieval_file, train_nothing

import train
from newllm.config import EARLIER
from newllm.data.samples import load_data
from newllm.errors import exit_on_user_error
from newllm.phases import retrieval
from newllm.retrieval import keys, mixture
from newllm.retrieval.ngram import KneserNey
from newllm.saving import checkpoint, runs, trained
from newllm.saving.checkpoint import write_state
from newllm.saving.runs import CONTROL
from newllm.saving.stop import EXIT_STATUS, Stopped, poll
from newllm.saving.trained import open_model, open_retrieval
from scripts import generate


@pytest.fixture(autouse=True)
def folder(tmp_path):
    return tmp_path / "checkpoints"


def rows(summary):
    return {k: v for k, v in summary.items() if "retrieval" in k and not k.startswith("seconds")}


# Stopped


@pytest.mark.parametrize("place", ["build", "gather", "fit", "cross_fitted", "time"])
def test_a_stop_inside_changes_nothing(looking_up, folder, monkeypatch, capsys, place):
    """In good order, exit 75; the next start makes the stage from its beginning, as if never stopped."""
    expected, summary = looking_up.complete(ON)
    config = copy_of(looking_up.cut(), folder)
    before = {path: path.read_bytes() for path in folder.glob("model_*.pt")}
    limit = 1e-6 if place == "time" else 0.0
    with monkeypatch.context() as patch:
        if place != "time":
            real = getattr(retrieval, place)

            def asked(*arguments):
                signal.raise_signal(signal.SIGTERM)
                return real(*arguments)

            patch.setattr(retrieval, place, asked)
        with pytest.raises(SystemExit) as end, exit_on_user_error():
            train.main(replace(config, max_minutes=limit))
    assert end.value.code == EXIT_STATUS and "it goes on from what is saved" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.glob("model_*.pt")} == before
    train_nothing(monkeypatch)
    assert rows(train.main(config)) == rows(summary)
    assert_equal(config, expected)


def test_a_stop_in_the_untrained_row_changes_nothing(looking_up, folder, monkeypatch):
    """Its own rows of retrieval come behind the control's training: that is not done twice."""
    expected, _ = looking_up.complete(ON)
    config = replace(expected, checkpoint_dir=str(folder))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train, "counting", lambda *_: signal.raise_signal(signal.SIGTERM) or poll())
        train.main(config)
    train.main(config)
    assert_equal(config, expected)


# Added to a run, and left out


@pytest.mark.parametrize("version", ["none", "earlier"])
def test_after_a_complete_run_without_it_nothing_is_trained(looking_up, folder, monkeypatch, version):
    """Whether it said "none" or is of a version that knew no retrieval: a run with all rows, as if alone."""
    config = copy_of(looking_up.complete(OFF)[0], folder, retrieval=ON)
    state = latest(config)
    if version == "earlier":
        del state["results"]["retrieval"]
        lost = EARLIER.keys() - {"label_smoothing"}  # which would shape its training
        state["config"] = {name: value for name, value in state["config"].items() if name not in lost}
        write_state(folder, state | {"save_number": state["save_number"] + 1})
    expected, summary = looking_up.complete(ON)
    train_nothing(monkeypatch)
    found = train.main(config)
    assert rows(found) == rows(summary) and set(ROWS) <= found.keys()
    assert_equal(config, expected)
    assert not rows(train.main(replace(config, retrieval=OFF)))
    assert latest(config)["run_id"] == state["run_id"]  # kept as it was
    assert train.main(config)["run_id"] == found["run_id"]


def test_a_run_that_gets_it_on_the_way_has_all_rows(looking_up, folder):
    """Begun without, stopped in Phase 2, continued with: what is behind is made at the end."""
    expected, _ = looking_up.complete(ON)
    config = replace(expected, checkpoint_dir=str(folder))
    stop_after(replace(config, retrieval=OFF), 2 * 3 + 3 + 2)
    assert latest(config)["stage"] == "phase2" and "counting" not in latest(config)["results"]["untrained"]
    train.main(config)
    assert_equal(config, expected)


def test_without_the_controls_weights_its_row_is_left_out_with_a_line(looking_up, folder, capsys):
    config = replace(looking_up.complete(ON)[0], checkpoint_dir=str(folder))
    train.main(replace(config, retrieval=OFF, phase="1"))
    (folder / CONTROL).unlink()
    found = train.main(config)
    assert "the untrained control's weights are gone" in capsys.readouterr().out
    assert [name in found for name in ROWS] == [True, True, False]


def test_without_it_is_another_run_which_takes_over_all_training(looking_up, folder, monkeypatch, capsys):
    """To the bit, with no row of retrieval; the run with it keeps its file, and comes back."""
    config = copy_of(looking_up.complete(ON)[0], folder)
    before, run_id = retrieval_file(config).read_bytes(), latest(config)["run_id"]
    expected = latest(looking_up.complete(OFF)[0])
    train_nothing(monkeypatch)
    without = replace(config, retrieval=OFF)
    assert not rows(train.main(without)) and f"retrieval '{ON}' -> 'none'" in capsys.readouterr().out
    one, other = latest(without)["results"], expected["results"]
    assert not (found := difference(one["phase2"], other["phase2"], "phase2")), found
    assert one.keys() == other.keys() and one["untrained"].keys() == other["untrained"].keys()
    assert not (folder / "model_retrieval.pt").exists()
    assert retrieval_file(config, "runs", run_id).read_bytes() == before
    assert train.main(config)["run_id"] == run_id and retrieval_file(config).read_bytes() == before
    assert "made anew" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [dict(retrieval="cache"), dict(retrieval_keys="contexts"), dict(retrieval_window=9)],
    ids=lambda changes: next(iter(changes)),
)
def test_looking_up_otherwise_is_another_run_that_trains_nothing(looking_up, folder, monkeypatch, changes):
    """It takes over all that was trained, the control too, and ends as in a folder of its own."""
    config = copy_of(looking_up.complete(ON)[0], folder, **changes)
    with monkeypatch.context() as patch:
        train_nothing(patch)
        found = train.main(config)
    assert set(ROWS) <= found.keys() and len(list((folder / "runs").iterdir())) == 1
    if "retrieval_keys" in changes:
        alone = replace(config, checkpoint_dir=f"{folder}_alone")
        train.main(alone)
        assert_equal(config, alone)


def test_another_definition_of_what_is_looked_up_makes_it_anew(looking_up, folder, monkeypatch, capsys):
    """By another number of its format: nothing is trained, and no figure by the earlier definition stays."""
    config = copy_of(looking_up.complete(ON)[0], folder)
    earlier = latest(config)
    train_nothing(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(mixture, "FORMAT", 2)
        for module in (checkpoint, runs, trained):
            patch.setattr(module, "RETRIEVAL_FORMAT", 2)
        patch.setattr(keys, "LAST_TOKENS", 1)
        generate.main(["--model_path", config.checkpoint_dir, "--max_tokens", "2"])
        assert "is of another version: give a checkpoint of a run's end, or" in capsys.readouterr().err
        found = train.main(config)
        generate.main(["--model_path", config.checkpoint_dir, "--max_tokens", "2"])
        said = capsys.readouterr()
        assert "its retrieval has format 1, this version makes 2" in said.out and not said.err
    results = [state["results"] for state in (earlier, latest(config))]
    assert found["run_id"] != earlier["run_id"]
    for stage, row in ("untrained", "counting"), ("untrained", "retrieval"), ("retrieval", "own"):
        before, after = ((part[stage] if row == "own" else part[stage][row])["ppl"] for part in results)
        assert before != after, row


# What it is made of, and by


def test_the_store_holds_the_training_samples_and_nothing_else(looking_up):
    """Every pair of a token and the next one, by ids; the counts are those of the training samples alone."""
    config, _ = looking_up.complete(ON)
    data, state = load_data(config), kept(config)["state"]
    starts, following = state["store.starts"], state["store.following"]
    tokens = torch.arange(data.vocab_size).repeat_interleave(starts.diff())
    pairs = sorted(zip(tokens.tolist(), following.tolist(), strict=True))
    ids = data.train.long()
    assert pairs == sorted(zip(ids[:, :-1].flatten().tolist(), ids[:, 1:].flatten().tolist(), strict=True))
    counts = KneserNey(5, data.vocab_size).fit(data.train.numpy()).state_dict()
    assert all(torch.equal(state[f"ngram.{name}"], column) for name, column in counts.items())
    texts = [{data.tokenizer.decode(sample.tolist()) for sample in part} for part in (data.train, data.val)]
    assert texts[0].isdisjoint(texts[1])


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("gru", "fp32"), ("lstm", "bf16"), ("transformer", "bf16"), ("window", "fp32"), ("token", "fp32")],
)
def test_every_network_goes_through_the_stage(looking_up, folder, kind, precision):
    """Saved, and opened again with what it looks up."""
    own = dict(model_type=kind, token_layers=1, context_dim=32, precision=precision)
    config = replace(looking_up.complete(ON)[0], checkpoint_dir=str(folder), **own)
    found = train.main(config)
    assert 1 < found["val_ppl_retrieval"] < 300 and "val_ppl_retrieval_untrained" not in found
    model, _, content = open_model(config.checkpoint_dir)
    assert open_retrieval(config.checkpoint_dir, model, content, pytest.fail).names[0] == "network"
