"""What a complete run leaves to be looked at, views of its record: arrays, table, summary, pictures, page."""

import base64
import csv
import io
from pathlib import Path

from newllm.errors import UserError
from newllm.report.answers import answers
from newllm.report.pictures import by_position, loss_curve, run_contexts
from newllm.report.record import format_value, read_records, shown
from newllm.report.summary import CONTEXTS, language_rows, plain, retrieval_rows, summary_lines
from newllm.saving.files import write_text

ADDED = "Each row with a + adds a part to those above it; the weights are those of all of them together."
GLOSSARY = (
    "Effective rank: the share of their width that contexts use. A sweep: one step at all tokens at once. "
    "Cold-start error: how far contexts are, after sweeps from nothing, from those of reading token by "
    "token, relative to their size. Memory horizon: how many tokens later a replaced token still changes a "
    "context by 1 %. Past capacity: how many earlier tokens a straight-line fit reads back from a context."
)


def artifact_paths(folder, kind, run):
    """{name: path} of all that a run may leave in `<checkpoint_dir>/<data>`; train.py writes the model."""
    name, logs, plots = f"{kind}_{run}", folder / "logs", folder / "outputs" / "plots"
    return {
        "model": folder / "models" / f"{name}.pth",
        "loss_curve": plots / f"loss_curve_{name}.png",
        "contexts": plots / f"contexts_{name}.png",
        "retrieval": plots / f"retrieval_{name}.png",
        "report": folder / "outputs" / f"report_{name}.html",
        "summary": logs / f"training_summary_{name}.txt",
        "train_losses": logs / f"train_losses_{name}.npy",
        "val_losses": logs / f"val_losses_{name}.npy",
        "table": logs / "models.csv",
    }


def write_artifacts(record):
    """Make all of them but the model anew from a run's record; returns {name: path}.

    OSError where a file cannot be written, UserError where the record does not say how the run ended.
    """
    import numpy as np

    if not record.summary:
        remedy = "run the same command again, with room on the disk"
        raise UserError(f"{record.path} does not say how the run ended: {remedy}.")
    paths = artifact_paths(record.folder, record.kind, record.run)
    paths["report"].parent.mkdir(parents=True, exist_ok=True)
    there = {
        "loss_curve": (loss_curve, record.phase2),
        "retrieval": (by_position, record.curves.get("retrieval_by_position")),
        "contexts": (run_contexts, "er_ceiling" in record.summary),
    }
    pictures = {}
    for name, (draw, known) in there.items():
        if known:
            draw(record, paths[name])
            pictures[name] = paths[name]
    if record.phase2:
        for side in ("train", "val"):
            np.save(paths[f"{side}_losses"], np.array(record.phase2[f"{side}_loss"], float))
    write_text(paths["report"], page(record, pictures))
    write_text(paths["table"], models_table(record.path.parent))
    write_text(paths["summary"], "\n".join(summary_lines(record, paths)) + "\n")
    return {name: path for name, path in paths.items() if name != "model" and path.exists()}


def page(record, pictures):
    """One self-contained page of a run as HTML: answers, samples, figures beside the untrained, settings.

    pictures: {"loss_curve", "retrieval" or "contexts": PNG file} of those that there are.
    """
    from jinja2 import Environment

    images = {name: base64.b64encode(path.read_bytes()).decode() for name, path in pictures.items()}
    environment = Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.render(
        record=record,
        summary=record.summary,
        answers=answers(record),
        sections=_sections(record.summary),
        pictures=images,
        folded=_folded(record),
    )


def _sections(summary):
    """(heading, picture, header, rows, note) of what is shown open; without rows there is no table."""
    sections = [("Training", "loss_curve", (), [], "")]
    if "val_ppl" in summary:
        rows = [(name, f"{ppl:.1f}", f"{bpb:.3f}") for name, ppl, bpb in language_rows(summary)]
        header = ("held-out dialogues", "perplexity", "bits per byte")
        sections.insert(0, ("Language model", "", header, rows, ""))
    if "val_ppl_retrieval" in summary:
        header = ("what is looked up", "perplexity", "against the network", "mean weight")
        rows = retrieval_rows(summary)
        sections.append(("What each part of retrieval is worth", "retrieval", header, rows, ADDED))
    if "er_ceiling" in summary:
        ends = {"untrained": "_untrained", "Phase 1": "", "fine-tuned": "_finetuned"}
        ends = {title: end for title, end in ends.items() if f"er_val{end}" in summary}
        rows = [
            [what, *(shown(summary.get(key + end), form) for end in ends.values())]
            for key, (what, form) in CONTEXTS.items()
        ]
        sections.append(("Contexts", "contexts", ("contexts", *ends), rows, GLOSSARY))
    return sections


def _folded(record):
    """(heading, header, rows) of what is shown when it is asked for."""
    folded = []
    for title, columns in (("Phase 1, by iteration", record.phase1), ("Phase 2, by epoch", record.phase2)):
        if columns:
            rows = zip(*(map(format_value, values) for values in columns.values()), strict=True)
            folded.append((title, list(columns), list(rows)))
    commit = record.start.get("git_commit")
    facts = {"device": record.start["device"], "commit": commit, **plain(record.summary)}
    for title, values in (("All figures", facts), ("Settings", record.config)):
        rows = [(name, format_value(value)) for name, value in values.items()]
        folded.append((title, ("name", "value"), rows))
    return folded


def models_table(folder):
    """Every complete run of a logs folder as a row of CSV: settings and results, with the columns of all."""
    rows = []
    for record in read_records(sorted(folder.glob("metrics_*.jsonl"))):
        if not record.summary:
            continue
        row = {"run": record.run, "started": record.start["time"], "finished": record.summary["time"]}
        row |= record.config | {"commit": record.start.get("git_commit")}
        # The device that was in effect takes the column of the one asked for; other settings stay.
        own = record.config.keys() - {"device"} | {"time"}
        row |= {key: value for key, value in plain(record.summary).items() if key not in own}
        rows.append(row)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
