"""The comparison on a tiny corpus: every arm trains, resumes as a sweep, and ends in a table."""

import dataclasses
import json
from argparse import Namespace
from pathlib import Path

import pytest

from config import ResidualConfig
from newllm.errors import UserError
from scripts import compare, report


def arguments(tmp_path, **changes):
    plain = dict(
        arms="all",
        seeds=1,
        tokens="288",
        results=str(tmp_path / "results"),
        tune=False,
        report=False,
        keep=False,
    )
    return Namespace(**plain | changes)


@pytest.fixture
def here(monkeypatch):
    """Runs in this process: the arms are what is tested, not the processes."""
    monkeypatch.setattr(compare, "call_apart", lambda function, *given: function(*given))


def test_every_arm_trains_and_has_its_row(tiny_settings, tmp_path, here, capsys):
    """All arms, one seed; files, table, picture; asked again, nothing is trained again."""
    config = ResidualConfig(**tiny_settings | dict(context_dim=24, embed_dim=16, phase2_epochs=2))
    compare.main(config, arguments(tmp_path))
    results = Path(tmp_path / "results")
    assert {path.name for path in results.glob("*.json")} == {f"{arm}-12-0.json" for arm in compare.ARMS}
    losses = {}
    for path in results.glob("*.json"):
        found = json.loads(path.read_text())
        losses[found["arm"]] = found["val_loss"]
        assert len(found["val_sample_nats"]) == 6
        assert sum(found["val_sample_nats"]) / 6 / 24 == pytest.approx(found["val_loss"], rel=1e-3)
    assert len(set(losses.values())) == len(losses)  # no two arms are the same run under two names
    lines = (results / "comparison.md").read_text()
    assert all(f"| {arm} |" in lines for arm in compare.ARMS) and "| (kn) |" in lines
    assert (results / "comparison_288.png").exists()
    capsys.readouterr()
    compare.main(config, arguments(tmp_path))
    assert "epoch" not in capsys.readouterr().out


def test_a_result_says_where_it_comes_from_and_keeps_what_is_asked_for(tiny_settings, tmp_path, here, capsys):
    """Run, device, date and commit in each file; with keep the model, pictures and summary in a folder that report takes."""
    config = ResidualConfig(**tiny_settings | dict(phase2_epochs=1))
    compare.main(config, arguments(tmp_path, arms="gru"))
    folder = Path(config.checkpoint_dir) / "gru-12-0"
    assert not list(folder.glob("*/models/*"))
    compare.main(config, arguments(tmp_path, arms="gru,token", keep=True))
    for name in ("gru", "token"):
        found = json.loads((tmp_path / "results" / f"{name}-12-0.json").read_text())
        assert (
            found["device"].startswith("CPU, ")
            and found["date"] > "2026"
            and {"run_id", "commit"} <= found.keys()
        )
    kept = Path(config.checkpoint_dir) / "token-12-0"
    for pattern in ("models/*.pth", "outputs/plots/*.png", "outputs/*.html", "logs/training_summary_*.txt"):
        assert len(list(kept.glob(f"*/{pattern}"))) == 1
    assert not list(kept.glob("model_*.pt"))
    capsys.readouterr()
    report.main(["--checkpoint_dir", str(kept)])
    assert "Found 1 model checkpoints" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"only those of other commands.*gru-12-0, .*token-12-0"):
        report.main(["--checkpoint_dir", config.checkpoint_dir])


def test_more_arms_and_seeds_keep_what_is_made(tiny_settings, tmp_path, here, monkeypatch):
    """Extended, from an empty checkpoint_dir too, only what is missing is trained; other settings are refused by name."""
    trained = []
    monkeypatch.setattr(
        compare, "call_apart", lambda function, config: trained.append(config) or function(config)
    )
    config = ResidualConfig(**tiny_settings | dict(phase2_epochs=1))
    compare.main(config, arguments(tmp_path, arms="token"))
    elsewhere = ResidualConfig(
        **tiny_settings | dict(phase2_epochs=1, checkpoint_dir=str(tmp_path / "elsewhere"))
    )
    compare.main(elsewhere, arguments(tmp_path, arms="token,window", seeds=2))
    assert [(c.model_type, c.seed) for c in trained] == [
        ("token", 0),
        ("window", 0),
        ("token", 1),
        ("window", 1),
    ]
    other = ResidualConfig(**tiny_settings | dict(phase2_epochs=2, checkpoint_dir=str(tmp_path / "other")))
    with pytest.raises(UserError, match=r"token-12-0\.json was made with other settings \(phase2_epochs\)"):
        compare.main(other, arguments(tmp_path, arms="token"))
    text = tmp_path / "another.jsonl"
    text.write_bytes(Path(config.data_source).read_bytes())
    other = dataclasses.replace(elsewhere, data_source=str(text), checkpoint_dir=str(tmp_path / "third"))
    with pytest.raises(UserError, match=r"other settings \(data_source\)"):
        compare.main(other, arguments(tmp_path, arms="token"))


def test_files_that_are_not_what_they_should_be_are_refused(tiny_settings, tmp_path, here):
    """A torn choice of the grid, a file that is no result: a sentence each, and the file stays."""
    results = tmp_path / "results"
    results.mkdir()
    for name, content, sentence in (
        ("tuned.json", "{", r"tuned\.json cannot be read"),
        ("tuned.json", "3", r"tuned\.json cannot be read"),
        ("token-12-0.json", '{"arm": "token"}', r"token-12-0\.json is no result of this version"),
    ):
        (results / name).write_text(content)
        with pytest.raises(UserError, match=sentence):
            compare.main(ResidualConfig(**tiny_settings), arguments(tmp_path, arms="token"))
        assert (results / name).read_text() == content
        (results / name).unlink()


def test_tuning_uses_training_dialogues_alone_and_its_choice_is_used(
    tiny_settings, tmp_path, here, monkeypatch
):
    """Points are judged on a share of the training samples; the best is written down and taken by the next runs."""
    monkeypatch.setattr(compare, "GRID", dict(phase2_learning_rate=(0.002, 0.02), dropout=(0.0,)))
    monkeypatch.setattr(compare, "TUNING_START", (0.002, 0.0))
    config = ResidualConfig(**tiny_settings | dict(phase2_epochs=2))
    compare.main(config, arguments(tmp_path, arms="token", tune=True))
    points = [json.loads(path.read_text()) for path in Path(tmp_path / "results" / "tuning").glob("*.json")]
    assert len(points) == 2 and all(len(point["val_sample_nats"]) == round(0.2 * 12) for point in points)
    best = min(points, key=lambda point: point["val_loss"])
    tuned = json.loads((tmp_path / "results" / "tuned.json").read_text())
    assert tuned == {"12": {"token": {name: best["changes"][name] for name in compare.GRID}}}
    other = ResidualConfig(**tiny_settings | dict(phase2_epochs=2, checkpoint_dir=str(tmp_path / "main")))
    compare.main(other, arguments(tmp_path, arms="token"))
    found = json.loads((tmp_path / "results" / "token-12-0.json").read_text())
    assert found["changes"]["phase2_learning_rate"] == best["changes"]["phase2_learning_rate"]


def test_the_walk_over_the_grid_ends_where_no_neighbour_is_better(
    tiny_settings, tmp_path, monkeypatch, capsys
):
    """On a bowl it finds the bottom, in a corner too, without the far side; an ablation has its arm's choice."""
    tried = []

    def make(config, runs, folder):
        for name, changes in runs.items():
            rate, dropout = (changes[axis] for axis in compare.GRID)
            tried.append((rate, dropout))
            result = dict(arm="gru", seed=0, changes=changes, settings={}, val_sample_nats=[])
            loss = abs(rate - 0.0005) * 1000 + abs(dropout - 0.15)
            (folder / f"{name}.json").write_text(json.dumps(result | {"val_loss": loss, "val_ppl": 2 + loss}))

    monkeypatch.setattr(compare, "make", make)
    compare.main(ResidualConfig(**tiny_settings), arguments(tmp_path, arms="gru,phase1_w1", tune=True))
    tuned = json.loads((tmp_path / "results" / "tuned.json").read_text())
    assert tuned == {"12": {"gru": dict(phase2_learning_rate=0.0005, dropout=0.15)}}
    assert f"| 12 | gru | 0.0005 | 0.15 | 2.0 | {len(tried)} |" in capsys.readouterr().out
    assert len(set(tried)) == len(tried) < 14 and (0.004, 0.5) not in tried
    plan = compare.plan(["phase1_w1"], 1, [12], {"12": {"phase1_frozen": dict(dropout=0.1)}})
    assert plan["phase1_w1-12-0"]["dropout"] == 0.1


def test_unknown_arms_and_numbers_are_refused():
    """One sentence each."""
    with pytest.raises(UserError, match="there is no arm 'gpt'"):
        compare.chosen_arms("gru,gpt")
    with pytest.raises(UserError, match="--tokens takes numbers"):
        compare.whole_numbers("6400,many")
