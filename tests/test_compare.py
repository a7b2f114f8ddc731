"""The comparison on a tiny corpus: every arm trains, goes on where it was cut off, and ends in a table."""

import dataclasses
import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest

from config import ResidualConfig
from newllm.errors import UserError
from newllm.flags import parse_args
from newllm.report.compare import append_row, read_results
from newllm.saving.files import save_sealed
from newllm.saving.stop import Interrupt, Stopped
from scripts import compare

ROOT = Path(__file__).parent.parent
EVERYTHING = "ngram,cache,knn"


def arguments(tmp_path, *flags):
    """Of the command, by default for one seed at 12 samples."""
    given = ["--seeds", "1", "--tokens", "288", "--results", str(tmp_path / "results"), *flags]
    return parse_args(ResidualConfig, given, extra=compare.flags)[1]


@pytest.fixture
def trained(monkeypatch):
    """Runs in this process, as the arms are what is tested; the configurations of those that trained."""
    configs = []
    monkeypatch.setattr(compare, "call_apart", lambda main, config: configs.append(config) or main(config))
    return configs


@pytest.fixture
def without_page(monkeypatch):
    """Neither tables nor pictures, which take longer than the runs."""
    monkeypatch.setattr(compare, "report", lambda results: None)


@pytest.fixture
def small(tiny_settings):
    """A configuration of runs that take half a second."""
    return ResidualConfig(**tiny_settings | dict(phase2_epochs=1, phase1_max_iterations=1))


def test_every_arm_trains_and_has_its_row(small, tmp_path, trained, capsys):
    """All arms, one seed: rows, page, pictures, artefacts if asked for; then nothing is trained again."""
    config = dataclasses.replace(small, context_dim=24, phase1_max_iterations=3, retrieval="ngram")
    arms = [arm for arm in compare.ARMS if arm not in compare.VARIANTS]
    compare.main(config, arguments(tmp_path, "--arms", "window", "--keep"))
    given = arguments(tmp_path, "--arms", ",".join(arms))
    compare.main(config, given)
    folder, checkpoints = tmp_path / "results", Path(config.checkpoint_dir)
    rows = {row["arm"]: row for row in read_results(folder / "results.jsonl")}
    assert rows.keys() == set(arms)
    # no two arms are the same run under two names
    assert len({row["val_ppl"] for row in rows.values()}) == len(rows)
    for row in rows.values():
        assert {"run_id", "commit", "device", "date"} <= row.keys()
        for end in ("", "_retrieval"):
            nats = sum(row[f"val_sample_nats{end}"]) / 6 / 24
            assert math.exp(nats) == pytest.approx(row[f"val_ppl{end}"], rel=1e-3)
    page = (folder / "comparison.md").read_text()
    assert all(f"| {arm} |" in page for arm in [*arms, "counting"]) and "## Claims" in page
    assert {path.name for path in folder.glob("*.png")} == {"contexts.png", "results.png", "sweeps.png"}
    assert not list(checkpoints.glob("gru-12-0/*/models/*"))
    for pattern in ("models/*.pth", "outputs/plots/*.png", "outputs/*.html", "logs/training_summary_*.txt"):
        assert list(checkpoints.glob(f"window-12-0/*/{pattern}"))
    trained.clear()
    compare.main(config, given)
    assert not trained and (folder / "comparison.md").read_text() == page


def left(folder):
    """What takes space of runs that have their rows."""
    return [path for path in Path(folder).rglob("*") if path.name.startswith("model_") or path.name == "runs"]


def test_what_differs_in_what_is_looked_up_alone_is_trained_once(small, tmp_path, trained, without_page):
    """Its training is taken over to the bit, and what it looks up is its own; no checkpoint is left."""
    config = dataclasses.replace(small, retrieval=EVERYTHING)
    arms = "end_to_end_by_contexts,gru,end_to_end,end_to_end_with_cache"
    compare.main(config, arguments(tmp_path, "--arms", arms))
    rows = {row["arm"]: row for row in read_results(tmp_path / "results" / "results.jsonl")}
    assert list(rows) == ["end_to_end_by_contexts", "end_to_end", "end_to_end_with_cache", "gru"]
    homes = [Path(config.checkpoint_dir).name for config in trained]
    assert homes == ["end_to_end-12-0"] * 3 + ["gru-12-0"]
    ours = [row for arm, row in rows.items() if arm != "gru"]
    for key in ("seconds_phase2", "val_ppl", "val_sample_nats"):
        assert ours[0][key] == ours[1][key] == ours[2][key] != rows["gru"][key]
    assert len({row["val_ppl_retrieval"] for row in ours}) == 3
    assert not left(config.checkpoint_dir)


def test_cut_anywhere_it_ends_as_if_nobody_had_cut_it(small, tmp_path, trained, without_page, monkeypatch):
    """At several of the moments at which somebody asks whether to stop, and between row and clean-up."""
    arms, asked, cut = ["--arms", "end_to_end,end_to_end_by_contexts"], [], [math.inf]
    wish = Interrupt.wish.fget
    monkeypatch.setattr(
        Interrupt,
        "wish",
        property(lambda self: asked.append(0) or ("cut" if len(asked) >= cut[0] else wish(self))),
    )

    def rows_of(folder, at=math.inf):
        config = dataclasses.replace(small, retrieval=EVERYTHING, checkpoint_dir=str(folder / "checkpoints"))
        cut[0] = at
        asked.clear()
        if at < math.inf:
            with pytest.raises(Stopped):
                compare.main(config, arguments(folder, *arms))
            cut[0] = math.inf
        compare.main(config, arguments(folder, *arms))
        assert not left(config.checkpoint_dir)
        keys = ("run", "val_ppl", "val_sample_nats", "val_ppl_retrieval", "val_sample_nats_retrieval")
        return [[row[key] for key in keys] for row in read_results(folder / "results" / "results.jsonl")]

    whole = rows_of(tmp_path / "whole")
    moments = len(asked)
    for number in (1, 3):
        assert rows_of(tmp_path / str(number), moments * number // 4) == whole
    monkeypatch.setattr(compare, "clear", lambda folder: (_ for _ in ()).throw(Stopped("cut")))
    config = dataclasses.replace(small, retrieval=EVERYTHING, checkpoint_dir=str(tmp_path / "last"))
    with pytest.raises(Stopped):
        compare.main(config, arguments(tmp_path, *arms))
    monkeypatch.undo()
    monkeypatch.setattr(compare, "report", lambda results: None)
    assert left(tmp_path / "last")
    compare.main(config, arguments(tmp_path, *arms))
    assert not left(tmp_path / "last")


def test_a_run_is_made_again_from_its_row(small, tmp_path, trained, without_page, capsys):
    """With other settings in effect: the row's count, to the bit; another figure is refused, as is no row."""
    config = dataclasses.replace(small, retrieval="ngram,cache", phase1_max_iterations=2)
    compare.main(config, arguments(tmp_path, "--arms", "end_to_end"))
    again = arguments(tmp_path, "--repeat", "end_to_end-12-0")
    compare.main(small, again)
    assert "end_to_end-12-0: the figures agree to the bit" in capsys.readouterr().out
    path = tmp_path / "results" / "results.jsonl"
    (row,) = read_results(path)
    for device, error in ((row["device"], True), ("another", False)):
        append_row(path, row | {"val_ppl_retrieval": 2 * row["val_ppl_retrieval"], "device": device})
        with pytest.raises(UserError, match="other figures than its row") if error else nullcontext():
            compare.main(small, again)
        assert "-5.00e-01" in capsys.readouterr().out
    save_sealed({}, tmp_path / "a.pth")
    taught = dataclasses.replace(small, teachers=str(tmp_path / "a.pth"))
    for other, flags, sentence in (
        (small, ["--repeat", "gru-12-0"], "has no row of a run gru-12-0"),
        (taught, ["--repeat", row["run"]], "was made with teachers '', not 'a.pth#[0-9a-f]{12}': give it by"),
        (dataclasses.replace(small, data_source="b.jsonl"), ["--repeat", row["run"]], "give it by --data"),
    ):
        with pytest.raises(UserError, match=sentence):
            compare.main(other, arguments(tmp_path, *flags))
    assert not left(config.checkpoint_dir) and len(read_results(path)) == 1


def test_more_arms_and_seeds_keep_what_is_made_and_other_settings_are_refused(
    small, tmp_path, trained, without_page
):
    """From an empty checkpoint_dir too, only what is missing is trained; another row is refused by name."""
    compare.main(small, arguments(tmp_path, "--arms", "gru"))
    elsewhere = dataclasses.replace(small, checkpoint_dir=str(tmp_path / "elsewhere"))
    compare.main(elsewhere, arguments(tmp_path, "--arms", "gru,window", "--seeds", "2"))
    made = [(config.model_type, config.seed) for config in trained]
    assert made == [("gru", 0), ("window", 0), ("gru", 1), ("window", 1)]
    for name, value in (("phase2_epochs", 2), ("data_source", "another.jsonl")):
        other = dataclasses.replace(elsewhere, **{name: value})
        with pytest.raises(UserError, match=rf"gru-12-0 was made with other settings \({name}\)"):
            compare.main(other, arguments(tmp_path, "--arms", "gru"))


def test_a_stop_leaves_no_row_and_another_process_may_have_made_the_run(small, tmp_path, monkeypatch):
    """Stopped in the second run: the first has its row, and a run that got one meanwhile is not made."""
    path, config = tmp_path / "results" / "results.jsonl", dataclasses.replace(small, untrained_control=False)

    def call_apart(main, config):
        if config.model_type == "window":
            raise Stopped("SIGTERM received")
        summary = main(config)
        other = dataclasses.replace(config, model_type="lstm").to_dict()
        append_row(path, dict(run="lstm-12-0", arm="lstm", seed=0, changes={}, settings=other) | summary)
        return summary

    monkeypatch.setattr(compare, "call_apart", call_apart)
    with pytest.raises(Stopped):
        compare.main(config, arguments(tmp_path, "--arms", "gru,lstm,window"))
    assert [row["run"] for row in read_results(path)] == ["lstm-12-0", "gru-12-0"]


GRID = dict(phase2_learning_rate=(0.002, 0.02), dropout=(0.0,), weight_decay=(0.1,))


def test_tuning_uses_training_dialogues_alone_and_its_choice_is_used(
    small, tmp_path, trained, without_page, monkeypatch
):
    """Points are judged on a share of the training samples; the best is taken by the next runs."""
    monkeypatch.setattr(compare, "GRID", GRID)
    monkeypatch.setattr(compare, "TUNING_START", (0.002, 0.0, 0.1))
    compare.main(small, arguments(tmp_path, "--arms", "gru", "--tune"))
    points = read_results(tmp_path / "results" / "tuning.jsonl")
    assert len(points) == 2 and all(len(point["val_sample_nats"]) == round(0.2 * 12) for point in points)
    best = min(points, key=lambda point: point["val_loss"])
    compare.main(small, arguments(tmp_path, "--arms", "gru"))
    (row,) = read_results(tmp_path / "results" / "results.jsonl")
    assert row["changes"].items() >= {name: best["changes"][name] for name in GRID}.items()


@pytest.fixture
def bowl(monkeypatch):
    """Runs are not made: their loss is least at (0.0005, 0.15, 1). The points at which it was asked for."""
    tried = []

    def make(config, runs, path):
        for name, (arm, changes) in runs.items():
            rate, dropout, decay = point = tuple(changes[axis] for axis in compare.GRID)
            tried.append(point)
            loss = abs(rate - 0.0005) * 1000 + abs(dropout - 0.15) + abs(math.log(decay)) / 10
            settings = compare.meaning(compare.config_of(config, changes).to_dict())
            row = dict(run=name, arm=arm, seed=0, changes=changes, settings=settings, val_sample_nats=[])
            append_row(path, row | {"val_loss": loss, "val_ppl": 2 + loss})

    monkeypatch.setattr(compare, "make", make)
    return tried


def test_the_walk_over_the_grid_ends_where_no_neighbour_is_better(small, tmp_path, bowl, capsys):
    """The bottom without the far side; an ablation has its arm's choice, a larger budget a smaller one's."""
    path = tmp_path / "results" / "tuning.jsonl"
    compare.main(small, arguments(tmp_path, "--arms", "gru,phase1_w1", "--tune"))
    best = compare.tried(read_results(path))[12, "gru"]
    assert compare.place(best[0]) == (0.0005, 0.15, 1.0)
    assert f"| gru | 0.0005 / 0.15 / 1: 2.0 ({len(set(bowl))}) |" in capsys.readouterr().out
    assert len(set(bowl)) < 18 and all(point[:2] != (0.004, 0.5) for point in bowl)
    plan = compare.plan(["phase1_w1"], 1, [6, 12, 24], {(12, "phase1_frozen"): best})
    chosen = dict(phase2_learning_rate=0.0005, dropout=0.15, weight_decay=1.0)
    for samples in (12, 24):
        assert plan[f"phase1_w1-{samples}-0"][1].items() >= chosen.items()
    assert not plan["phase1_w1-6-0"][1].keys() & chosen.keys()


def test_the_page_of_results_is_what_its_rows_say():
    """docs/results.md is the committed rows' page, whole; each row is one line with sorted keys."""
    _, lines = compare.page_of(ROOT / "results", "../results")
    assert (ROOT / "docs" / "results.md").read_text() == "\n".join(lines)
    for name in (compare.ROWS, compare.TUNING_ROWS):
        count = len(read_results(ROOT / "results" / name))
        stored = [json.loads(line) for line in (ROOT / "results" / name).read_text().splitlines()]
        assert len(stored) == count and all(list(row) == sorted(row) for row in stored)


def test_what_cannot_be_is_one_sentence(small, tmp_path):
    """An arm that there is not, a budget without a sample, a report of nothing."""
    for flags, sentence in (
        (["--arms", "gru,gpt"], "there is no arm 'gpt'"),
        (["--tokens", "900,5"], "--tokens 5 is less than one sample"),
        (["--report"], "there are no results"),
    ):
        with pytest.raises(UserError, match=sentence):
            compare.main(small, arguments(tmp_path, *flags))
