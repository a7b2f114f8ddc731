"""What a run leaves behind to be looked at: tables, arrays, pictures and a page, all views of its record.

Layout, below `<checkpoint_dir>/<data>/`: `logs/` summary, losses, models.csv; `outputs/plots/` pictures; `outputs/` the page;
`models/` the best weights, which train.py writes.
"""

import csv
import io
from pathlib import Path
from statistics import fmean

from newllm.errors import UserError
from newllm.report.banner import STAGE_TITLES, batches, trainable
from newllm.report.page import write_page
from newllm.report.record import find_records, read_record
from newllm.report.run_plots import context_curves, loss_curve
from newllm.report.runlog import STAGES, format_value
from newllm.report.status import remaining
from newllm.saving.files import write_text

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
        raise UserError(
            f"{record.path} does not say how the run ended: run the same command again, with room on the disk."
        )
    paths, written = artifact_paths(record.folder, record.kind, record.run), []

    def write(name, function):
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        function(paths[name])
        written.append(name)

    if record.phase2:
        for side in ("train", "val"):
            write(
                f"{side}_losses",
                lambda path, side=side: np.save(path, np.array(record.phase2[f"{side}_loss"])),
            )
        write("loss_curve", lambda path: loss_curve(record, path))
    if "er_ceiling" in record.summary:
        write("contexts", lambda path: context_curves(record, path))
    write("table", lambda path: write_text(path, models_table(record.path.parent)))
    write("summary", lambda path: write_text(path, "\n".join(summary_lines(record)) + "\n"))
    write(
        "report",
        lambda path: write_page(record, [paths[n] for n in ("loss_curve", "contexts") if n in written], path),
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
            **_in_effect(record),
            "learning rate": f"{config['phase1_learning_rate']:g} in Phase 1, {config['phase2_learning_rate']:g} in Phase 2",
            "seed": config["seed"],
            "device": start["device"],
            "attention": start.get("attention", "none"),
            "versions": ", ".join(f"{name} {version}" for name, version in start.get("versions", {}).items()),
            "commit": start.get("git_commit"),
        },
        "RESULTS": {
            **{
                f"{which} {side} loss": f"{value:.4f}"
                for side, losses in (("training", "train_loss"), ("validation", "val_loss"))
                if losses in record.phase2
                for which, value in (
                    ("final", record.phase2[losses][-1]),
                    ("best", min(record.phase2[losses])),
                )
            },
            "training time": f"{seconds:.1f} s of {summary['seconds']:.1f} s, {record.sessions} session(s)",
            **{key: format_value(value) for key, value in summary.items() if key != "time"},
        },
        "ARTEFACTS": {
            name: path
            for name, path in artifact_paths(record.folder, record.kind, record.run).items()
            if path.exists()
        },
    }
    lines = [f"TRAINING SUMMARY of run {record.run}, begun {start['time']}"]
    for title, values in sections.items():
        lines += ["", title, *(f"  {name}: {value}" for name, value in values.items())]
    return lines


def speed_lines(record):
    """Where the time of a run went; the parts add up to the whole."""
    summary, lines = record.summary, ["SPEED ANALYSIS"]
    for title, columns, key, unit in (
        ("Phase 1", record.phase1, "phase1", "iterations"),
        ("Phase 2", record.phase2, "phase2", "epochs"),
    ):
        if (
            columns and f"seconds_{key}" in summary
        ):  # a run that stops after Phase 1 may have begun Phase 2 before
            count, seconds = len(next(iter(columns.values()))), summary[f"seconds_{key}"]
            lines.append(
                f"  {title}: {count} {unit}, {count * summary['train_tokens']:,} tokens, {seconds:.1f} s, "
                f"{summary[f'tok_per_s_{key}']:,.0f} tok/s"
            )
    if record.phase2 and "seconds_phase2" in summary:
        validation = sum(record.phase2["seconds_validation"])
        lines.append(
            f"  of Phase 2, validation: {validation:.1f} s ({validation / summary['seconds_phase2']:.1%})"
        )
    share, background = summary["saving_share"], summary["saving_share_background"]
    lines.append(
        f"  saving, in the last session: training waited {share:.2%} of the time, a thread worked {background:.2%}"
    )
    return [*lines, "", *time_lines(record)]


def time_lines(record):
    """Each part of a run's wall time over all sessions; what no part names is measured too and stands as "other"."""
    times, total = record.times, record.times.get("seconds", record.summary["seconds"])
    lines = ["WHERE THE TIME WENT"]
    for part, seconds in sorted(
        times.get("parts", {"not told apart": total}).items(), key=lambda pair: -pair[1]
    ):
        lines.append(f"  {part}: {seconds:.1f} s ({seconds / max(total, 1e-9):.1%})")
    lines.append(f"  total: {total:.1f} s in {record.sessions} session(s)")
    if times.get("saves"):
        mean = times["save_seconds"] / times["saves"]
        lines.append(
            f"  {times['saves']} saves by a thread beside the training: mean {mean:.2f} s, longest {times['longest_save']:.2f} s"
        )
    if times:
        waiting = times["parts"].get("fetching rows", 0.0) / max(total, 1e-9)
        lines.append(f"  waiting for data: {waiting:.2%} of the time")
    loads = [
        load
        for rows in (record.phase1, record.phase2)
        for load in rows.get("gpu_utilization", [])
        if load is not None
    ]
    told = f"{fmean(loads):.0f}% in the mean of the epochs" if loads else "not available on this device"
    return [*lines, f"  GPU utilisation: {told}"]


def so_far_lines(record, status, baseline=None):
    """What a run that is not complete has done, how fast, and what is left.

    Args:
        status: fields of the status file, {} where they are another run's. baseline: record of a complete run to compare with.
    """
    plan, state = record.start.get("plan", {}), status.get("state", "not complete")
    about = f"{record.config['model_type']}, {record.start['data'][0] if record.start.get('data') else record.folder.name}"
    lines = [f"RUN {record.run} ({state}), begun {record.start['time']}: {about}"]
    spent, left, total, speed = 0.0, {}, 0, 0.0
    begun = [stage for stage in plan if getattr(record, stage) or status.get("stage") == stage]
    for stage, of in plan.items():
        rows, title = getattr(record, stage), STAGE_TITLES[stage]
        if stage not in begun:
            lines.append(
                f"  {title}: not begun" + (f", about {left[stage]:.0f} s (estimate)" if stage in left else "")
            )
            continue
        count = len(rows.get(STAGES[stage], []))
        done = count * of["tokens"] // of["passes"]
        speed = rows["tok_per_s"][-1] if rows.get("tok_per_s") else 0.0
        if status.get("stage") == stage:
            done, speed = max(done, status.get("tokens_done", 0)), speed or status.get("tok_per_s", 0.0)
        total, spent = total + done, spent + done / max(speed, 1e-9) * bool(speed)
        left = remaining(plan, stage, done, speed) if stage == begun[-1] else {}
        losses = [
            loss for loss in rows.get("val_loss", []) if loss is not None
        ]  # null where it was not finite
        loss = f", best val loss {min(losses):.4f}" if losses else ""
        lines.append(
            f"  {title}: {count} of at most {of['passes']} {STAGES[stage]}s, {done:,} tokens, {done / speed if speed else 0:.1f} s, "
            f"{speed:,.0f} tok/s{loss}{_against(stage, speed, baseline)}"
        )
    return lines + _whole(plan, total, spent, left)


def _whole(plan, tokens, spent, left):
    planned, rest = sum(of["tokens"] for of in plan.values()), sum(left.values())
    lines = [
        f"  progress: {tokens:,} of at most {planned:,} tokens of all phases ({tokens / max(planned, 1):.1%})"
    ]
    if not left:
        return [*lines, "  speed, remaining and total: not known yet"]
    return [
        *lines,
        f"  done: {spent:.1f} s of training",
        f"  remaining: {rest:.1f} s, at most and estimated from the speed measured so far",
        f"  total: {spent + rest:.1f} s, without loading and measuring contexts",
    ]


def _against(stage, speed, baseline):
    theirs = baseline and baseline.summary.get(f"tok_per_s_{stage}")
    return f", {speed / theirs:.2f} times the speed of run {baseline.run}" if theirs and speed else ""


def _in_effect(record):
    """Batches and trainable parameters as the run had them; of an earlier version's record, what was asked for."""
    if plan := record.start.get("plan"):
        return {"batch size": batches(plan), "trainable parameters": trainable(plan)}
    config = record.config
    return {
        "batch size": f"{config['phase1_batch_size']} in Phase 1, {config['phase2_batch_size']} in Phase 2, at most"
    }


def models_table(folder):
    """Every complete run of a logs folder as a row of CSV, settings and results, with the columns of all of them."""
    rows = []
    for path in sorted(folder.glob("metrics_*.jsonl")):
        try:
            record = read_record(path)
        except UserError:
            continue  # of an earlier version: it stays, and has no row
        if record.summary:
            # The device that was in effect takes the column of the one asked for; other names have one meaning.
            results = {
                key: value
                for key, value in record.summary.items()
                if key not in record.config or key == "device"
            }
            about = {"run": record.run, "started": record.start["time"], "finished": results.pop("time")}
            rows.append(about | record.config | {"commit": record.start.get("git_commit")} | results)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def find_run(folder, run):
    """The record of a run: by its id below a checkpoint_dir, by its record's path, or the latest complete one of another folder.

    Raises:
        UserError: there is none.
    """
    if Path(run).is_file():
        return read_record(run)
    if Path(run).is_dir():
        return complete(runs_in(run), run)[-1]
    records = runs_in(folder)
    for record in records:
        if record.run == run:
            return record
    raise UserError(
        f"there is no run '{run}' in {Path(folder)}: there are {', '.join(r.run for r in records)}; a folder of runs or a "
        "metrics_*.jsonl will do as well."
    )


def runs_in(folder):
    """Records of the runs below a checkpoint_dir, the newest last.

    Raises:
        UserError: there is none.
    """
    records = []
    for path in find_records(folder):
        try:
            records.append(read_record(path))
        except UserError as error:
            print(f"warning: {error}")
    if not records:
        deeper = sorted({path.parents[2] for path in Path(folder).glob("*/*/logs/metrics_*.jsonl")})
        if deeper:
            raise UserError(
                f"{Path(folder)} holds no run of train.py, only those of other commands in folders of their own: give one of "
                f"these by --checkpoint_dir: {', '.join(map(str, deeper))}."
            )
        raise UserError(f"no run has been begun in {Path(folder)}: train one with train.py.")
    return records


def complete(records, folder):
    """Those of the records that say how their run ended.

    Raises:
        UserError: there is none.
    """
    if found := [record for record in records if record.summary]:
        return found
    raise UserError(
        f"no run has been completed in {Path(folder)}: the same train.py command goes on with run {records[-1].run}; "
        "scripts.report says how far it is."
    )
