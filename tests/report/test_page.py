"""What a run leaves to be looked at says what its record says, and what report, evaluate and export do."""

import base64
import csv
import json
import re
import shutil
import zipfile
from datetime import datetime
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_dialogues
from PIL import Image

from config import ResidualConfig
from newllm.errors import UserError
from newllm.report.answers import QUESTIONS, answers
from newllm.report.page import artifact_paths, models_table, page
from newllm.report.record import RunLog, find_records, read_record
from newllm.report.summary import network_share, speed_lines
from newllm.saving.trained import load_model, open_saved
from scripts import evaluate, export
from train import main as train

RUNS = FIRST, SECOND = "20260101_000000", "20260102_000000"


@pytest.fixture(scope="module")
def folder(settings):
    """A folder with a run of both phases and one of a GRU."""
    with pytest.MonkeyPatch.context() as patch:
        for run, changes in ((FIRST, {}), (SECOND, dict(model_type="gru", load_checkpoint=False))):
            patch.setattr("train.new_run_id", lambda run=run: run)
            train(ResidualConfig(**settings | changes))
    return Path(settings["checkpoint_dir"])


@pytest.fixture
def copied(folder, tmp_path):
    """One of its own, to change."""
    return shutil.copytree(folder, tmp_path / "checkpoints")


@pytest.fixture
def record(folder):
    return read_record(find_records(folder)[0])


def paths_of(record):
    return artifact_paths(record.folder, record.kind, record.run)


def test_every_artefact_is_there_and_holds_the_losses(folder, record):
    """A GRU has no picture of contexts. Arrays equal the history; pictures have 150 DPI."""
    gru = read_record(find_records(folder)[1])
    assert (record.kind, gru.kind) == ("context", "gru")
    missing = [{name for name, path in paths_of(of).items() if not path.exists()} for of in (record, gru)]
    assert missing == [set(), {"contexts"}]
    paths = paths_of(record)
    for side in ("train", "val"):
        assert np.load(paths[f"{side}_losses"]).tolist() == record.phase2[f"{side}_loss"]
    for name in ("loss_curve", "contexts", "retrieval"):
        with Image.open(paths[name]) as image:
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)


def test_the_table_has_a_row_a_run_and_the_columns_of_all(copied):
    """Every row has every column, run, device in effect, date and commit; what is no record is left out."""
    logs = copied / "dialogues" / "logs"
    (logs / "metrics_19990101_000000.jsonl").write_text("not a record\n")
    assert models_table(logs) == (logs / "models.csv").read_text()
    rows = list(csv.reader(models_table(logs).splitlines()))
    assert len(rows) == 3 and len({len(row) for row in rows}) == 1 and len(set(rows[0])) == len(rows[0])
    context, gru = (dict(zip(rows[0], row, strict=True)) for row in rows[1:])
    assert (context["model_type"], gru["model_type"]) == ("context", "gru")
    assert context["er_val"] and not gru["er_val"] and gru["phase2_epochs"] == "3"
    assert float(context["val_loss"]) == read_record(find_records(copied)[1]).summary["val_loss"]
    for row in (context, gru):
        assert row["run_id"] == row["run"] and row["device"].startswith("CPU, ") and row["date"] > "2026"
        assert re.fullmatch(r"[0-9a-f]{40}|", row["commit"])


def test_the_summary_and_the_speed_add_up(record):
    """Sections and figures of the summary; the parts of the time, each measured by itself, are the whole."""
    text = paths_of(record)["summary"].read_text()
    losses = record.phase2["train_loss"][-1], min(record.phase2["val_loss"])
    for pattern in (
        r"vocab_size: 300", r"num_layers: 1", r"parameters: \d+", r"phase2_epochs: 3", r"seed: 42",
        r"batches: 4 samples in Phase 1 \(3 a pass\), 4 samples in Phase 2 \(3 a pass\)", r"date: 20",
        r"trainable: [\d,]+ in Phase 1, [\d,]+ in", r"phase2_learning_rate: ", r"er_val_untrained: 0\.\d+",
        rf"final train_loss: {losses[0]:.4f}", rf"best val_loss: {losses[1]:.4f}", r"device: CPU",
        r"git_commit: ", r"loss_curve: .*\.png", r"attention: none", rf"run_id: {FIRST}",
    ):  # fmt: skip
        assert re.search(pattern, text), pattern
    lines, times = "\n".join(speed_lines(record, {})), record.times
    shown = {name: float(s) for name, s in re.findall(r"^  ([\w -]+): ([\d.]+) s \(", lines, re.MULTILINE)}
    assert {"loading", "untrained control", "Phase 1", "validation", "saving", "report", "other"} < set(shown)
    assert all(shown[part] == pytest.approx(times["parts"][part], abs=0.06) for part in times["parts"])
    assert sum(times["parts"].values()) == pytest.approx(times["seconds"], rel=0.02)
    begun, ended = (datetime.fromisoformat(row["time"]) for row in (record.start, times))
    assert times["seconds"] > (ended - begun).total_seconds() - 1.1  # rows are dated to the second
    assert re.search(r"  \d+ saves by a thread: mean [\d.]+ s, longest [\d.]+ s", lines)
    for line in ("total: ", "waiting for data: ", "GPU utilisation: not available on this device"):
        assert f"  {line}" in lines


def test_the_page_stands_alone(record):
    """The pictures are in it, nothing is fetched; figures beside untrained ones."""
    text = paths_of(record)["report"].read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    assert len(pictures) == text.count("<img ") == 3 and "viewport" in text
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert "http" not in re.sub(r'base64,[^"]*', "", text)
    cells = set(re.findall(r"<t[dh]>([^<]*)</t[dh]>", text))
    perplexity = f"{record.summary['val_ppl']:.1f}"
    assert {"untrained", "Phase 1", "fine-tuned", perplexity, "bigram, counting"} < cells


def test_page_and_summary_say_what_each_part_of_retrieval_is_worth(record):
    """A row for each expert added, in turn, and for each control; a sentence on the network's own part."""
    text = paths_of(record)["report"].read_text()
    table = text.partition("What each part of retrieval is worth")[2].partition("</table>")[0]
    rows = [re.findall(r"<td>([^<]*)</td>", row) for row in table.split("<tr>")[2:]]
    summary = record.summary
    in_turn = ["val_ppl", "val_ppl_network_ngram", "val_ppl_network_ngram_cache", "val_ppl_retrieval"]
    controls = [f"val_ppl_retrieval_{name}" for name in ("fixed", "counting", "untrained")]
    controls += [f"val_ppl_retrieval_{name}_contexts" for name in ("phase1", "untrained")]
    assert [row[1] for row in rows] == [f"{summary[key]:.1f}" for key in in_turn + controls]
    assert rows[1][2] == f"{summary['val_ppl_network_ngram'] / summary['val_ppl'] - 1:+.1%}"
    names = ("network", "ngram", "cache", "knn")
    assert [row[3] for row in rows[:4]] == [f"{summary[f'retrieval_weight_{name}']:.0%}" for name in names]
    sentence = network_share(summary)
    assert sentence in unescape(text) and sentence in paths_of(record)["summary"].read_text()
    shown = dict(val_ppl_retrieval=90.0, val_ppl_retrieval_counting=100.0)
    assert "reach 100.0 without any network; with it 90.0, 10.0% below that" in network_share(shown)
    assert "110.0, 10.0% above that" in network_share(shown | dict(val_ppl_retrieval=110.0))


def test_what_the_record_holds_is_shown_and_not_obeyed(copied):
    """A data source or a warning that looks like markup is text."""
    path = find_records(copied)[0]
    path.write_text(path.read_text().replace('"data_source": "dialogues"', '"data_source": "<script>&"'))
    with open(path, "a") as file:
        file.write(json.dumps({"stage": "warning", "message": "<b>so</b>"}) + "\n")
    text = page(read_record(path), {})
    assert "&lt;script&gt;&amp;" in text and "&lt;b&gt;so" in text and "<script>" not in text


def evaluated(capsys, path, *flags):
    evaluate.main([str(path), *flags, "--json"])
    return json.loads(capsys.readouterr().out)


def test_the_saved_weights_have_the_logged_loss(folder, corpus_file, tmp_path, capsys):
    """The model file of each run, opened as plain data, and checkpoints; on held-out and other dialogues."""
    for path in find_records(folder):
        record = read_record(path)
        file, loss = paths_of(record)["model"], record.summary["val_loss"]
        assert torch.load(file, weights_only=True)["metrics"]["loss"] == loss
        found = evaluated(capsys, file)
        assert found["val_loss"] == pytest.approx(loss, rel=1e-6) and found["model_type"] == record.kind
    found = evaluated(capsys, folder / "model_best.pt")
    assert found["val_loss"] == pytest.approx(loss, rel=1e-6) and found["run_id"] == record.run
    assert found["parameters"] == record.summary["parameters"] and found["val_tokens"] == 6 * 24
    other = write_dialogues(tmp_path / "other.jsonl", 20, seed=1)
    found = evaluated(capsys, file, "--data_source", str(other), "--samples", "3")
    assert (found["data_source"], found["val_tokens"]) == ("other", 72)
    with pytest.raises(UserError, match="ask for fewer"):
        evaluate.main([str(file), "--samples", "10000"])


def test_a_checkpoint_tells_what_it_holds(folder, capsys):
    """A listing needs neither data nor code that unpickles."""
    record = read_record(find_records(folder)[1])
    best = evaluated(capsys, folder / "model_best.pt", "--inspect")
    assert best["phase"] == "phase2" and best["val_loss"] == record.summary["val_loss"]
    assert best["saved_at"].startswith("20") and best["versions"].startswith("newllm")
    assert best["data_fingerprint"] == record.start["fingerprint"]
    weights = torch.load(folder / "model_best.pt", weights_only=True)["model_state_dict"].values()
    assert best["model_tensors"] == len(weights) and "num_samples = 12" in best["differs_from_config.py"]
    epoch = evaluated(capsys, folder / "model_epoch.pt", "--inspect")
    assert (epoch["label"], epoch["epoch"], epoch["steps"]) == ("phase2_epoch_3", 3, 9)
    evaluate.main([str(paths_of(record)["model"]), "--inspect"])
    assert "kind: model file" in capsys.readouterr().out


def test_the_report_lists_shows_and_compares(copied, reported, tmp_path):
    """By id, the latest without one; a damaged model is said to be one; sentences for what is not there."""
    text = reported(copied, *RUNS)
    assert re.search(r"model_type +\| +context \| +gru", text)
    assert re.search(r"val_ppl +\| +[\d.]+ \| +[\d.]+ \| +[\d.]+", text)
    assert "the settings are the same" in reported(copied, FIRST, FIRST)
    text = reported(copied)
    assert f"TRAINING SUMMARY of run {SECOND}" in text and "SPEED ANALYSIS" in text
    assert re.search(r"Found 2 model checkpoints\n(  .*\.pth \d+\.\d MB sha256 [0-9a-f]{12}\n){2}", text)
    assert "Found 5 training plots" in text and "Found 2 training summaries" in text
    model, _ = copied.glob("*/models/*.pth")
    model.write_bytes(model.read_bytes()[:-200] + b"x" * 200)
    text = reported(copied, FIRST)
    assert f"TRAINING SUMMARY of run {FIRST}" in text and text.count("DAMAGED") == 1
    for arguments, sentence in (
        ([copied, "nothing"], f"no run 'nothing' in .*: there are {FIRST}, {SECOND}"),
        ([copied, *RUNS, "third"], "name one run, or two"),
        ([tmp_path / "empty"], r"no run has begun in .*empty"),
    ):
        with pytest.raises(UserError, match=sentence):
            reported(*arguments)


def test_an_export_holds_a_run_whole(folder, tmp_path, capsys):
    """Unpacked elsewhere it is a folder of runs again, with a model that opens."""
    export.main([FIRST, "--checkpoint_dir", str(folder), "--output", str(tmp_path / "run.zip")])
    with zipfile.ZipFile(tmp_path / "run.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    (record,) = map(read_record, find_records(tmp_path / "unpacked"))
    assert all(path.exists() for path in paths_of(record).values())
    load_model(open_saved(paths_of(record)["model"])[1])
    with pytest.raises(UserError, match="choose another --output"):
        export.main(["--checkpoint_dir", str(folder), "--output", str(tmp_path / "missing" / "run.zip")])


def test_the_run_with_a_model_is_exported(copied, tmp_path, capsys):
    """The latest run has none (as after --phase 1): the one before is taken; without any the record alone."""
    where = ["--checkpoint_dir", str(copied), "--output", str(tmp_path / "run.zip")]
    for record, taken, left in (
        (read_record(find_records(copied)[1]), FIRST, "the latest that did is"),
        (read_record(find_records(copied)[0]), SECOND, "the file holds its record alone"),
    ):
        paths_of(record)["model"].unlink()
        export.main(where)
        text = capsys.readouterr().out
        assert left in text and taken in text and ("pth" in text) == (taken == FIRST)
    with pytest.raises(UserError, match=r"left no model .*: name another run, or train one to its end"):
        export.main([*where, "--format", "transformers"])


def test_disks_that_refuse_cost_the_artefacts_not_the_run(tiny_settings, monkeypatch, capsys):
    """No folder of models, no row of the end in the record: a line for each, and the closing block."""
    config = ResidualConfig(**tiny_settings | dict(artifacts=True))
    blocked = Path(config.checkpoint_dir) / "dialogues"
    blocked.mkdir(parents=True)
    (blocked / "models").write_text("in the way")
    write = RunLog._write
    monkeypatch.setattr(RunLog, "_write", lambda log, line: '"summary"' in line or write(log, line))
    train(config)
    text = capsys.readouterr().out
    assert text.count("the run goes on") == text.count("warning: no report: ") == 1 and "\n---\n" in text
    assert not (blocked / "outputs").exists()


def test_a_run_that_returns_to_phase_1_is_reported(copied, reported):
    """Phase 2 was begun and then left out: its rows are in the record, its figures not in the summary."""
    path = find_records(copied)[0]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (summary,) = (row for row in rows if row["stage"] == "summary")
    for key in list(summary):
        if key.startswith(("val_", "phase2_")) or key.endswith(("_phase2", "_finetuned", "_training")):
            del summary[key]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert "Phase 1: 3 of at most 3 iterations" in reported(copied, FIRST)
    assert "Phase 2, by epoch" in page(read_record(path), {})


def test_the_page_begins_with_four_answers_and_samples(folder):
    """Of both runs, in this order, before any table; each sample as it was written."""
    for record in map(read_record, find_records(folder)):
        text = unescape(paths_of(record)["report"].read_text())
        parts = [*QUESTIONS, *(sample["prompt"] for sample in record.summary["samples"])]
        places = [text.index(part) for part in parts]
        assert places == sorted(places) and places[-1] < text.index("<table")
        assert all(answer.words in text for answer in answers(record))
