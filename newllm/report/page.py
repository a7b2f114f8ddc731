"""What a complete run leaves to be looked at, views of its record: arrays, table, summary, pictures, page."""

import base64
import csv
import io
from pathlib import Path

from newllm.errors import UserError
from newllm.report.pictures import by_position, loss_curve, run_contexts
from newllm.report.record import format_value, read_records
from newllm.report.summary import language_rows, network_share, plain, retrieval_rows, summary_lines
from newllm.saving.files import write_text

CONTEXTS = (  # what it is, key, format
    ("effective rank, training tokens", "er_train", ".1%"),
    ("effective rank, validation tokens", "er_val", ".1%"),
    ("ceiling of effective rank at so many tokens", "er_ceiling", ".1%"),
    ("tokens converged after 10 cold sweeps", "converged_ratio", ".1%"),
    ("cold-start error after 10 sweeps", "cold_start_error_10", ".4g"),
    ("change of the error a sweep, times", "contraction", ".4g"),
    ("memory horizon, tokens", "memory_horizon", ".4g"),
    ("past capacity", "past_capacity", ".4g"),
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

    Raises:
        OSError: a file cannot be written.
        UserError: the record does not say how the run ended.
    """
    import numpy as np

    if not record.summary:
        remedy = "run the same command again, with room on the disk"
        raise UserError(f"{record.path} does not say how the run ended: {remedy}.")
    paths, pictures = artifact_paths(record.folder, record.kind, record.run), []
    paths["report"].parent.mkdir(parents=True, exist_ok=True)
    if record.phase2:
        for side in ("train", "val"):
            np.save(paths[f"{side}_losses"], np.array(record.phase2[f"{side}_loss"], float))
        loss_curve(record, paths["loss_curve"])
        pictures.append(paths["loss_curve"])
    if "er_ceiling" in record.summary:
        run_contexts(record, paths["contexts"])
        pictures.append(paths["contexts"])
    if record.curves.get("retrieval_by_position"):
        by_position(record, paths["retrieval"])
        pictures.append(paths["retrieval"])
    write_text(paths["report"], page(record, pictures))
    write_text(paths["table"], models_table(record.path.parent))
    write_text(paths["summary"], "\n".join(summary_lines(record, paths)) + "\n")
    return {name: path for name, path in paths.items() if name != "model" and path.exists()}


def page(record, pictures):
    """One self-contained page of a run as HTML: figures beside the untrained ones, PNG files, settings."""
    from jinja2 import Environment

    summary, device = record.summary, record.start["device"]
    tables, folded = [], []
    if "val_ppl" in summary:
        rows = [(name, f"{ppl:.1f}", f"{bpb:.3f}") for name, ppl, bpb in language_rows(summary)]
        tables.append(("Language model", ("held-out dialogues", "perplexity", "bits per byte"), rows, ""))
    if "val_ppl_retrieval" in summary:
        header = ("what is looked up", "perplexity", "against the network", "mean weight")
        rows, note = retrieval_rows(summary), network_share(summary)
        tables.append(("What each part of retrieval is worth", header, rows, note))
    if "er_ceiling" in summary:
        ends = {"untrained": "_untrained", "Phase 1": "", "fine-tuned": "_finetuned"}
        ends = {title: end for title, end in ends.items() if f"er_val{end}" in summary}
        rows = []
        for name, key, form in CONTEXTS:
            values = [summary.get(f"{key}{end}") for end in ends.values()]
            rows.append([name, *("" if value is None else format(value, form) for value in values)])
        tables.append(("Contexts", ("contexts", *ends), rows, ""))
    for title, columns in (("Phase 1, by iteration", record.phase1), ("Phase 2, by epoch", record.phase2)):
        if columns:
            rows = zip(*(map(format_value, values) for values in columns.values()), strict=True)
            folded.append((title, list(columns), list(rows)))
    facts = {"device": device, "commit": record.start.get("git_commit"), **plain(summary)}
    for title, values in (("All figures", facts), ("Settings", record.config)):
        rows = [(name, format_value(value)) for name, value in values.items()]
        folded.append((title, ("name", "value"), rows))
    data = f"{summary['train_tokens']:,} training tokens of {summary['data_source']}"
    size = f"{summary['parameters']:,} parameters, {summary['seconds']:.0f} s on {device}"
    images = [(path.stem, base64.b64encode(path.read_bytes()).decode()) for path in pictures]
    environment = Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.render(
        title=f"newllm {record.kind} {record.run}",
        about=f"{data}, tokenizer {summary['tokenizer']}, {size}",
        tables=tables,
        pictures=images,
        folded=folded,
        warnings=record.warnings,
    )


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
