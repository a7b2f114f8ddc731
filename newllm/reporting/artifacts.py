"""What a run leaves behind to be looked at: tables, arrays, pictures and a page, all views of its record.

Layout, below `<checkpoint_dir>/<data>/`: `logs/` summary, losses, models.csv; `outputs/plots/` pictures; `outputs/` the page;
`models/` the best weights, which train.py writes.
"""

import csv
import io
from pathlib import Path

from newllm.errors import UserError
from newllm.reporting.page import write_page
from newllm.reporting.record import find_records, read_record
from newllm.reporting.run_plots import context_curves, loss_curve
from newllm.reporting.runlog import format_value
from newllm.storage import write_text

TABLE = "models.csv"


def artifact_paths(folder, kind, run):
    """{name: path} of all that a run may leave.

    Args:
        folder: `<checkpoint_dir>/<data>`. kind: its model_type. run: its id.
    """
    name, logs, plots = f"{kind}_{run}", folder / "logs", folder / "outputs" / "plots"
    return {
        "model": folder / "models" / f"{name}.pth",
        "loss_curve": plots / f"loss_curve_{name}.png",
        "contexts": plots / f"contexts_{name}.png",
        "report": folder / "outputs" / f"report_{name}.html",
        "summary": logs / f"training_summary_{name}.txt",
        "train_losses": logs / f"train_losses_{name}.npy",
        "val_losses": logs / f"val_losses_{name}.npy",
        "table": logs / TABLE,
    }


def write_artifacts(record):
    """Make all of them anew from the record of a run that is complete.

    Returns:
        The paths of those written, by name.

    Raises:
        OSError: a file cannot be written.
        UserError: the record does not say how the run ended.
    """
    import numpy as np

    if not record.summary:
        raise UserError(f"{record.path} does not say how the run ended: free the disk and run the same command again.")
    paths, written = artifact_paths(record.folder, record.kind, record.run), []

    def write(name, function):
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        function(paths[name])
        written.append(name)

    if record.phase2:
        for side in ("train", "val"):
            write(f"{side}_losses", lambda path, side=side: np.save(path, np.array(record.phase2[f"{side}_loss"])))
        write("loss_curve", lambda path: loss_curve(record, path))
    if "er_ceiling" in record.summary:
        write("contexts", lambda path: context_curves(record, path))
    write("table", lambda path: write_text(path, models_table(record.path.parent)))
    write("summary", lambda path: write_text(path, "\n".join(summary_lines(record)) + "\n"))
    write(
        "report", lambda path: write_page(record, [paths[n] for n in ("loss_curve", "contexts") if n in written], path)
    )
    return {name: paths[name] for name in written}


def summary_lines(record):
    """The summary of a run as text: model, training, results, where its files lie."""
    config, start, summary = record.config, record.start, record.summary
    seconds = summary.get("seconds_training", summary.get("seconds_phase1", 0.0))
    sections = {
        "MODEL CONFIGURATION": {
            "model type": record.kind,
            "vocabulary size": summary["vocab_size"],
            "layers": config["num_layers"],
            "context width": config["context_dim"],
            "embedding width": config["embed_dim"],
            "parameters": f"{summary['parameters']:,}",
        },
        "TRAINING CONFIGURATION": {
            "data": f"{summary['data_source']}, tokenizer {summary['tokenizer']}",
            "training tokens": f"{summary['train_tokens']:,}",
            "epochs": config["phase2_epochs"],
            "batch size": f"{config['phase1_batch_size']} in Phase 1, {config['phase2_batch_size']} in Phase 2",
            "learning rate": f"{config['phase1_learning_rate']:g} in Phase 1, {config['phase2_learning_rate']:g} in Phase 2",
            "seed": config["seed"],
            "device": start["device"],
            "versions": ", ".join(f"{name} {version}" for name, version in start.get("versions", {}).items()),
            "commit": start.get("git_commit"),
        },
        "RESULTS": {
            **{
                f"{which} {side} loss": f"{value:.4f}"
                for side, losses in (("training", "train_loss"), ("validation", "val_loss"))
                if losses in record.phase2
                for which, value in (("final", record.phase2[losses][-1]), ("best", min(record.phase2[losses])))
            },
            "training time": f"{seconds:.1f} s of {summary['seconds']:.1f} s, {record.sessions} session(s)",
            **{key: format_value(value) for key, value in summary.items() if key != "time"},
        },
        "ARTEFACTS": {
            name: path for name, path in artifact_paths(record.folder, record.kind, record.run).items() if path.exists()
        },
    }
    lines = [f"TRAINING SUMMARY of run {record.run}, begun {start['time']}"]
    for title, values in sections.items():
        lines += ["", title, *(f"  {name}: {value}" for name, value in values.items())]
    return lines


def speed_lines(record):
    """Where the time of a run went; the parts add up to the whole."""
    summary, left = record.summary, record.summary["seconds"]
    lines = ["SPEED ANALYSIS"]
    for title, columns, key, unit in (
        ("Phase 1", record.phase1, "phase1", "iterations"),
        ("Phase 2", record.phase2, "phase2", "epochs"),
    ):
        if columns and f"seconds_{key}" in summary:  # a run that stops after Phase 1 may have begun Phase 2 before
            count, seconds = len(next(iter(columns.values()))), summary[f"seconds_{key}"]
            left -= seconds
            lines.append(
                f"  {title}: {count} {unit}, {count * summary['train_tokens']:,} tokens, {seconds:.1f} s, "
                f"{summary[f'tok_per_s_{key}']:,.0f} tok/s"
            )
    if record.phase2 and "seconds_phase2" in summary:
        validation = sum(record.phase2["seconds_validation"])
        lines.append(f"  of Phase 2, validation: {validation:.1f} s ({validation / summary['seconds_phase2']:.1%})")
    lines.append(f"  data, untrained control, evaluation, report: {left:.1f} s")
    lines.append(f"  total: {summary['seconds']:.1f} s in {record.sessions} session(s)")
    share, background = summary["saving_share"], summary["saving_share_background"]
    lines.append(
        f"  saving, in the last session: training waited {share:.2%} of the time, a thread worked {background:.2%}"
    )
    return lines


def models_table(folder):
    """Every complete run of a logs folder as a row of CSV, settings and results, with the columns of all of them."""
    rows = []
    for path in sorted(folder.glob("metrics_*.jsonl")):
        try:
            record = read_record(path)
        except UserError:
            continue  # of an earlier version: it stays, and has no row
        if record.summary:
            results = {key: value for key, value in record.summary.items() if key not in record.config}
            about = {"run": record.run, "started": record.start["time"], "finished": results.pop("time")}
            rows.append(about | record.config | {"commit": record.start.get("git_commit")} | results)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def find_run(records, run):
    """The record of a run among several.

    Raises:
        UserError: there is none.
    """
    for record in records:
        if record.run == run:
            return record
    raise UserError(f"there is no complete run '{run}' here: there are {', '.join(r.run for r in records)}.")


def runs_in(folder):
    """Records of the complete runs below a checkpoint_dir, the newest last.

    Raises:
        UserError: there is none.
    """
    records = []
    for path in find_records(folder):
        try:
            records.append(read_record(path))
        except UserError as error:
            print(f"warning: {error}")
    records = [record for record in records if record.summary]
    if not records:
        raise UserError(f"no run has been completed in {Path(folder)}: train one with train.py.")
    return records
