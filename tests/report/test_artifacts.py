"""What a run leaves to be looked at says what its record says, also after it was cut off and for several kinds of model."""

import base64
import csv
import json
import re
import shutil
import zipfile
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_dialogues
from PIL import Image

from config import ResidualConfig
from newllm.errors import UserError
from newllm.report import runlog
from newllm.report.artifacts import artifact_paths, models_table, speed_lines, summary_lines
from newllm.report.record import as_curve, find_records, read_record
from newllm.saving.trained import load_model, open_saved
from scripts import evaluate, export, report
from train import main as train


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus_file):
    """A folder with a run of both phases and one of a GRU."""
    root = tmp_path_factory.mktemp("artefacts")
    settings = dict(
        data_source=str(corpus_file), tokenizer="bpe", vocab_size=300, num_samples=12, val_samples=6, max_seq_length=24,
        context_dim=16, embed_dim=16, num_layers=1, phase1_max_iterations=3, phase1_batch_size=4, phase2_epochs=3,
        phase2_batch_size=4, min_batches=3, precision="fp32", device="cpu", cache_dir=str(root / "cache"),
        checkpoint_dir=str(root / "checkpoints"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for run, changes in (
            ("20260101_000000", {}),
            ("20260102_000000", dict(model_type="gru", load_checkpoint=False)),
        ):
            patch.setattr("train.new_run_id", lambda run=run: run)
            train(ResidualConfig(**settings | changes))
    return root / "checkpoints"


@pytest.fixture
def record(folder):
    return read_record(find_records(folder)[0])


def test_every_artefact_is_there_and_named_after_kind_and_run(folder, record):
    """The layout of the guide, for the model with contexts; a GRU has no picture of contexts."""
    gru = read_record(find_records(folder)[1])
    assert (record.kind, gru.kind) == ("context", "gru")
    for of in (record, gru):
        paths = artifact_paths(of.folder, of.kind, of.run)
        missing = {name for name, path in paths.items() if not path.exists()}
        assert missing == ({"contexts"} if of is gru else set())


def test_arrays_and_pictures_hold_the_losses(record):
    """Equal to the history, as long as the epochs; pictures at 150 DPI."""
    paths = artifact_paths(record.folder, record.kind, record.run)
    for side in ("train", "val"):
        assert (
            np.load(paths[f"{side}_losses"]).tolist() == record.phase2[f"{side}_loss"]
            and len(record.phase2["epoch"]) == 3
        )
    for name in ("loss_curve", "contexts"):
        with Image.open(paths[name]) as image:
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)


def test_a_record_counts_an_epoch_done_twice_once(record, tmp_path):
    """A run killed after an epoch's row and before its save writes the row again; a torn line is skipped."""
    lines = record.path.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    again = next(i for i, row in enumerate(rows) if row["stage"] == "phase2" and row["epoch"] == 2)
    changed = rows[again] | {"train_loss": 7.0}
    path = tmp_path / "data" / "logs" / "metrics_x.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(
        "\n".join([*lines[: again + 1], '{"torn', lines[0], json.dumps(changed), *lines[again + 1 :]])
    )
    found = read_record(path)
    assert found.phase2["epoch"] == [1, 2, 3] and found.phase2["train_loss"][1] == 7.0 and found.sessions == 2
    assert found.run == "x" and found.folder == tmp_path / "data"
    path.write_text('{"stage": "phase1", "iteration": 1}\n')
    with pytest.raises(UserError, match="does not say how the run began"):
        read_record(path)


def test_the_table_has_a_row_a_run_and_the_columns_of_all(folder, record, tmp_path):
    """Runs of other kinds have other figures; every row has every column; what is no record is left out."""
    logs = tmp_path / "data" / "logs"
    shutil.copytree(record.path.parent, logs)
    (logs / "metrics_19990101_000000.jsonl").write_text("not a record\n")
    rows = list(csv.reader(models_table(logs).splitlines()))
    assert len(rows) == 3 and len({len(row) for row in rows}) == 1 and len(set(rows[0])) == len(rows[0])
    by = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    assert [row["model_type"] for row in by] == ["context", "gru"] and by[0]["er_val"] and not by[1]["er_val"]
    assert float(by[0]["val_loss"]) == record.summary["val_loss"] and by[1]["phase2_epochs"] == "3"


def test_the_summary_and_the_speed_add_up(record):
    """Sections and figures of the summary; the parts of the time, each measured by itself, are the whole."""
    text = "\n".join(summary_lines(record))
    for pattern in (
        r"vocabulary size: 300", r"layers: 1", r"parameters: [\d,]+", r"epochs: 3", r"seed: 42",
        r"batch size: 4 samples in Phase 1 \(3 a pass\), 4 samples in Phase 2 \(3 a pass\)", r"trainable parameters: [\d,]+ in Phase 1, [\d,]+ in",
        r"attention: none", rf"run_id: {record.run}", r"device: CPU", r"date: 20",
        rf"final training loss: {record.phase2['train_loss'][-1]:.4f}", rf"best validation loss: {min(record.phase2['val_loss']):.4f}",
        r"er_val_untrained: 0\.\d+", r"er_val_finetuned: 0\.\d+", r"loss_curve: .*\.png", r"commit: ", r"device: CPU",
    ):  # fmt: skip
        assert re.search(pattern, text), pattern
    lines = "\n".join(speed_lines(record))
    parts = {
        name: float(seconds)
        for name, seconds in re.findall(r"^  ([\w -]+): ([\d.]+) s \(", lines, re.MULTILINE)
    }
    for part in (
        "loading",
        "untrained control",
        "Phase 1",
        "Phase 2",
        "validation",
        "contexts",
        "saving",
        "report",
        "other",
    ):
        assert parts.pop(part) == pytest.approx(record.times["parts"][part], abs=0.06)
    total = float(re.search(r"  total: ([\d.]+) s in 1 session", lines)[1])
    assert (
        sum(record.times["parts"].values()) == pytest.approx(record.times["seconds"], rel=0.02) and total > 0
    )
    begun, ended = (datetime.fromisoformat(row["time"]) for row in (record.start, record.times))
    assert record.times["seconds"] > (ended - begun).total_seconds() - 1.1  # rows are dated to the second
    saves = re.search(r"(\d+) saves by a thread.*: mean ([\d.]+) s, longest ([\d.]+) s", lines)
    # A save asked for while another is written is left to the next one, so their number depends on the machine.
    assert int(saves[1]) == record.times["saves"] > 1 and float(saves[2]) <= float(saves[3])
    assert "waiting for data: " in lines and "GPU utilisation: not available on this device" in lines


class Reader(HTMLParser):
    """Cells and picture sources of a page; every tag that must be closed is."""

    def __init__(self):
        super().__init__()
        self.cells, self.pictures, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_the_page_stands_alone(record):
    """Well formed; the pictures are in it, nothing is fetched; figures beside untrained ones."""
    path = artifact_paths(record.folder, record.kind, record.run)["report"]
    page, text = Reader(), path.read_text()
    page.feed(text)
    assert not page.open and "http" not in re.sub(r"base64,[^\"]*", "", text) and "viewport" in text
    assert len(page.pictures) == 2
    for source in page.pictures:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    for cell in (
        "untrained",
        "Phase 1",
        "fine-tuned",
        f"{record.summary['val_ppl']:.1f}",
        "bigram, counting",
    ):
        assert cell in page.cells


def test_the_model_file_has_the_logged_loss(folder, corpus_file, tmp_path, capsys):
    """Opened as plain data; evaluated anew, on the run's held-out dialogues and on others."""
    for path in find_records(folder):
        record = read_record(path)
        file = artifact_paths(record.folder, record.kind, record.run)["model"]
        assert torch.load(file, weights_only=True)["metrics"]["loss"] == record.summary["val_loss"]
        evaluate.main([str(file), "--json"])
        found = json.loads(capsys.readouterr().out)
        assert (
            found["val_loss"] == pytest.approx(record.summary["val_loss"], rel=1e-6)
            and found["model_type"] == record.kind
        )
        assert found["parameters"] == record.summary["parameters"] and found["val_tokens"] == 6 * 24
        other = write_dialogues(tmp_path / "other.jsonl", 20, seed=1)
        evaluate.main([str(file), "--data_source", str(other), "--samples", "3"])
        text = capsys.readouterr().out
        assert (
            "data_source: other" in text and "val_tokens: 72" in text and f"{found['val_loss']:.6g}" in text
        )
    with pytest.raises(UserError, match="ask for fewer"):
        evaluate.main([str(file), "--samples", "10000"])


def test_a_checkpoint_is_evaluated_and_tells_what_it_holds(folder, capsys):
    """The best and the latest state give the logged loss; a listing needs neither data nor code that unpickles."""
    record = read_record(find_records(folder)[1])
    for name in ("model_best.pt", "model_latest.pt"):
        evaluate.main([str(folder / name), "--json"])
        found = json.loads(capsys.readouterr().out)
        assert (
            found["val_loss"] == pytest.approx(record.summary["val_loss"], rel=1e-6)
            and found["run_id"] == record.run
        )
    best = inspected(folder / "model_best.pt", capsys)
    assert (
        best["phase"] == "phase2"
        and best["val_loss"] == record.summary["val_loss"]
        and best["saved_at"].startswith("20")
    )
    assert best["data_fingerprint"] == record.start["fingerprint"] and best["versions"].startswith("newllm")
    weights = torch.load(folder / "model_best.pt", weights_only=True)["model_state_dict"].values()
    assert best["model_tensors"] == len(weights) and best["model_mb"] == pytest.approx(
        sum(4e-6 * w.numel() for w in weights)
    )
    assert "num_samples = 12" in best["differs_from_config.py"]
    epoch = inspected(folder / "model_epoch.pt", capsys)
    assert (epoch["label"], epoch["epoch"], epoch["steps"], epoch["optimizer"]) == (
        "phase2_epoch_3",
        3,
        9,
        "yes",
    )
    assert epoch["all_tensors"] > epoch["model_tensors"]
    evaluate.main([str(artifact_paths(record.folder, record.kind, record.run)["model"]), "--inspect"])
    assert "kind: model file" in capsys.readouterr().out


def inspected(path, capsys):
    evaluate.main([str(path), "--inspect", "--json"])
    return json.loads(capsys.readouterr().out)


def test_the_report_lists_shows_compares_and_remakes(folder, capsys, tmp_path):
    """By id, the latest without one; a damaged model is said to be one; sentences for what is not there."""
    copied = tmp_path / "checkpoints"
    shutil.copytree(folder, copied)
    runs = [read_record(path).run for path in find_records(copied)]
    where = ["--checkpoint_dir", str(copied)]
    report.main(where)
    text = capsys.readouterr().out
    assert (
        "TRAINING SUMMARY of run " + runs[1] in text
        and "model type: gru" in text
        and "SPEED ANALYSIS" in text
    )
    assert re.search(r"Found 2 model checkpoints\n(  .*\.pth \d+\.\d MB sha256 [0-9a-f]{12}\n){2}", text)
    assert "Found 3 training plots" in text and "Found 2 training summaries" in text
    model, _ = copied.glob("*/models/*.pth")
    model.write_bytes(model.read_bytes()[:-200] + b"x" * 200)
    report.main([runs[0], *where])
    text = capsys.readouterr().out
    assert "TRAINING SUMMARY of run " + runs[0] in text and text.count("DAMAGED") == 1
    report.main([*runs, *where])
    text = capsys.readouterr().out
    assert re.search(r"model_type +\| +context \| +gru", text) and re.search(
        r"val_ppl +\| +[\d.]+ \| +[\d.]+ \| +[\d.]+", text
    )
    for page in copied.glob("*/outputs/*.html"):
        page.unlink()
    report.main([runs[0], "--remake", *where])
    assert len(list(copied.glob("*/outputs/*.html"))) == 1
    with pytest.raises(UserError, match=f"no run 'nothing' in .*: there are {runs[0]}, {runs[1]}"):
        report.main(["nothing", *where])
    with pytest.raises(UserError, match="no run has been begun"):
        report.main(["--checkpoint_dir", str(tmp_path / "empty")])


def test_runs_of_two_folders_are_compared(folder, record, tmp_path, capsys):
    """A folder stands for its latest complete run, a record for its own; the folder of --checkpoint_dir may be empty."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "dialogues" / "logs").mkdir(parents=True)
    shutil.copy(record.path, elsewhere / "dialogues" / "logs")
    for one in (str(elsewhere), str(elsewhere / "dialogues" / "logs" / record.path.name)):
        report.main([one, str(folder), "--checkpoint_dir", str(tmp_path / "empty")])
        assert re.search(r"model_type +\| +context \| +gru", capsys.readouterr().out)
    report.main([str(elsewhere), str(record.path)])
    assert "the settings are the same" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no run has been begun in .*empty"):
        report.main([str(elsewhere), "20260101_000000", "--checkpoint_dir", str(tmp_path / "empty")])


def test_the_table_says_which_run_on_what_when_and_by_which_code(folder):
    """Run, device in effect, date and commit stand in every row, so that a figure can be traced."""
    (table,) = folder.glob("*/logs/models.csv")
    for row in csv.DictReader(table.read_text().splitlines()):
        assert row["run_id"] == row["run"] and row["device"].startswith("CPU, ") and row["date"] > "2026"
        assert re.fullmatch(r"[0-9a-f]{40}|", row["commit"])


def test_pictures_of_ladders_and_prefill_are_counted(folder, capsys, tmp_path):
    """They lie in outputs/plots of checkpoint_dir itself, below no data source."""
    copied = tmp_path / "checkpoints"
    shutil.copytree(folder, copied)
    (copied / "outputs" / "plots").mkdir(parents=True)
    (copied / "outputs" / "plots" / "scale_ladder_1.png").touch()
    report.main(["--checkpoint_dir", str(copied)])
    assert "Found 4 training plots" in capsys.readouterr().out


def test_an_export_holds_a_run_whole(folder, tmp_path, capsys):
    """Unpacked elsewhere it is a folder of runs again, with a model that opens; a sentence where it cannot be written."""
    run = read_record(find_records(folder)[0]).run
    export.main([run, "--checkpoint_dir", str(folder), "--output", str(tmp_path / "run.zip")])
    assert f"context_{run}.pth" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "run.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    (record,) = map(read_record, find_records(tmp_path / "unpacked"))
    paths = artifact_paths(record.folder, record.kind, record.run)
    assert all(path.exists() for path in paths.values())
    load_model(open_saved(paths["model"])[1])
    with pytest.raises(UserError, match="choose another --output"):
        export.main(["--checkpoint_dir", str(folder), "--output", str(tmp_path / "missing" / "run.zip")])


def test_the_run_with_a_model_is_exported(folder, tmp_path, capsys):
    """The latest run has none (as after --phase 1): the one before is taken, and it is said; none at all: a line, or a sentence."""
    copied = tmp_path / "checkpoints"
    shutil.copytree(folder, copied)
    where = ["--checkpoint_dir", str(copied), "--output", str(tmp_path / "run.zip")]
    first, last = map(read_record, find_records(copied))
    artifact_paths(last.folder, last.kind, last.run)["model"].unlink()
    export.main(where)
    text = capsys.readouterr().out
    assert (
        f"run {last.run} left no model: the latest that did is {first.run}" in text
        and f"context_{first.run}.pth" in text
    )
    export.main([last.run, *where])
    assert f"run {last.run} left no model (" in capsys.readouterr().out
    artifact_paths(first.folder, first.kind, first.run)["model"].unlink()
    export.main(where)
    text = capsys.readouterr().out
    assert "the file holds its record alone" in text and ".pth" not in text
    with pytest.raises(UserError, match=r"left no model .*: name another run, or train one to its end"):
        export.main([*where, "--format", "transformers"])


def test_a_disk_that_refuses_costs_the_artefacts_not_the_run(tiny_settings, monkeypatch, capsys):
    """The folder of models and of pages cannot be made: warnings, and the closing block all the same."""
    config = ResidualConfig(**tiny_settings | dict(artifacts=True))
    blocked = Path(config.checkpoint_dir) / "dialogues"
    (blocked / "logs").mkdir(parents=True)
    for name in ("models", "outputs"):
        (blocked / name).write_text("in the way")
    train(config)
    text = capsys.readouterr().out
    assert (
        text.count("the run goes on") == 2
        and "\n---\n" in text
        and (blocked / "logs" / "models.csv").exists() is False
    )


@pytest.mark.parametrize("lost", ["start", "summary"])
def test_a_record_with_gaps_costs_the_report_not_the_run(tiny_settings, monkeypatch, capsys, lost):
    """The disk refused the row of the beginning, or of the end: one line, and the closing block all the same."""
    real = runlog._append_line

    def refuse(path, line):
        if json.loads(line)["stage"] == lost:
            raise OSError(28, "No space left on device")
        real(path, line)

    monkeypatch.setattr(runlog, "_append_line", refuse)
    train(ResidualConfig(**tiny_settings | dict(artifacts=True)))
    text = capsys.readouterr().out
    assert text.count("warning: no report: ") == 1 and "\n---\n" in text


def test_a_run_that_returns_to_phase_1_is_reported(tiny_settings, capsys):
    """Phase 2 was begun and then left out: its rows are in the record, its figures not in the summary."""
    config = ResidualConfig(**tiny_settings | dict(artifacts=True, phase="1"))
    train(config)
    (path,) = find_records(config.checkpoint_dir)
    with open(path, "a") as file:
        file.write(
            json.dumps(
                {"stage": "phase2", "epoch": 1, "train_loss": 5.0, "val_loss": 5.0, "seconds_validation": 1.0}
            )
        )
    report.main(["--checkpoint_dir", config.checkpoint_dir])
    text = capsys.readouterr().out
    assert "Phase 1: 3 iterations" in text and "  Phase 2: " not in text


def test_without_checkpoints_no_model_is_kept(tiny_settings):
    """Pictures and tables are, as the scale check shows them."""
    train(ResidualConfig(**tiny_settings | dict(artifacts=True, save_checkpoint=False)))
    folder = Path(tiny_settings["checkpoint_dir"])
    assert list(folder.glob("*/outputs/*.html")) and not list(folder.glob("*/models/*"))


def test_curves_are_read_whatever_their_shape():
    """A list counts from 1; keys that JSON made text are numbers again."""
    assert (
        as_curve([3, 4]) == {1.0: 3, 2.0: 4}
        and as_curve({"0": 5}) == {0.0: 5}
        and as_curve([]) is as_curve(None) is None
    )
