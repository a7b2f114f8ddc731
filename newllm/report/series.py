"""The runs of a command that makes several, and a small file that tells `scripts.status` how far it is."""

import contextlib
import json
import time
from pathlib import Path

from newllm.errors import UserError
from newllm.report.record import CUT_OFF, is_gone, this_process
from newllm.report.summary import plain
from newllm.saving.files import write_text

SERIES_NAME = "series.json"


def make_series(folder, runs, work, done=None):
    """Make several runs, one after the other; one that fails keeps no other from being made.

    `<folder>/series.json` is replaced whenever a run begins or the series ends, for those who watch. Nothing
    reads there what is done: the runs themselves know that, so a series may be cut off anywhere.

    Args:
        folder: an existing folder.
        runs: {name: {"size": cost relative to the others', "folder": where the run lies in this one}}, in
            order.
        work: function of a name that makes the run and returns its summary; at once where the run is
            complete.
        done: {name: summary} of runs that need no work.

    Returns:
        Summaries of all runs, in order.

    Raises:
        UserError: runs failed; all others are done. Anything else that `work` raises ends the series where
            it is.
    """
    states = [{"name": name, **run, "status": "pending", "metrics": {}} for name, run in runs.items()]
    for run in states:
        if done and run["name"] in done:
            run |= {"status": "done", "metrics": done[run["name"]]}
    path, fields = Path(folder) / SERIES_NAME, this_process() | {"runs": states}
    try:
        for run in states:
            if run["status"] == "done":
                continue
            run |= {"status": "running", "begun": time.time()}
            _write(path, fields)
            try:
                run |= {"metrics": work(run["name"]), "status": "done"}
            except UserError as error:
                run |= {"error": str(error), "status": "failed"}
                print(f"{run['name']} failed: {error}", flush=True)
            print(progress_line(progress(fields)), flush=True)
    finally:
        for run in states:
            if run["status"] == "running":
                run["status"] = "pending"
        _write(path, fields)
    failed = [run for run in states if run["status"] == "failed"]
    if failed:
        name, reason = failed[0]["name"], failed[0]["error"].rstrip(".")
        raise UserError(
            f"{len(failed)} of {len(states)} runs failed, the first of them ({name}) because {reason}: mend "
            "that and run the same command again, which makes only what is missing."
        )
    return [run["metrics"] for run in states]


def _write(path, fields):
    runs = [run | {"metrics": plain(run["metrics"])} for run in fields["runs"]]
    text = json.dumps(fields | {"runs": runs})
    valid = json.loads(text, parse_constant=lambda name: None)  # JSON has neither NaN nor infinity
    with contextlib.suppress(OSError):  # then nobody can watch; the runs are made all the same
        write_text(path, json.dumps(valid, indent=1) + "\n")


def read_series(folder):
    """Content of a folder's series.json with the values of `progress`; None without the file.

    Raises:
        UserError: the file is there and cannot be read.
    """
    path = Path(folder) / SERIES_NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return fields | progress(fields)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): remove it; no run is lost by that.") from error


def progress(fields):
    """How far a series is: state, total, done, failed, remaining (runs), elapsed_s, eta_s (None: unknown)."""
    runs = {status: [] for status in ("done", "failed", "running", "pending")}
    for run in fields["runs"]:
        runs[run["status"]].append(run)
    left, spent, eta = runs["running"] + runs["pending"], 0.0, None
    state = CUT_OFF if left or runs["failed"] else "complete"
    if runs["running"] and not is_gone(fields):
        state, spent = "running", time.time() - runs["running"][0]["begun"]
    seconds = sum(run["metrics"]["seconds"] for run in runs["done"])
    if runs["done"]:
        seconds_per_size = seconds / sum(run["size"] for run in runs["done"])
        eta = max(0.0, seconds_per_size * sum(run["size"] for run in left) - spent)
    counts = {"total": len(fields["runs"]), "done": len(runs["done"]), "failed": len(runs["failed"])}
    return {"state": state, **counts, "remaining": len(left), "elapsed_s": seconds + spent, "eta_s": eta}


def progress_line(counts):
    """`Runs: 5, 2 done, 0 failed, 3 remaining | Elapsed: 312s | ETA: 1100s`."""
    eta = "unknown" if counts["eta_s"] is None else f"{counts['eta_s']:.0f}s"
    parts = ", ".join(f"{counts[name]} {name}" for name in ("done", "failed", "remaining"))
    return f"Runs: {counts['total']}, {parts} | Elapsed: {counts['elapsed_s']:.0f}s | ETA: {eta}"


def series_lines(fields):
    """What a person reads: how far the series is, and a line for each run."""
    return [
        f"{progress_line(fields)} ({fields['state']})",
        *(f"  {r['name']}: {r['status']}" for r in fields["runs"]),
    ]


def whole_numbers(flag):
    """Type of a flag that takes several: `1953,195` -> (195, 1953).

    Raises:
        UserError: something else than different positive integers.
    """

    def parse(text):
        try:
            numbers = sorted(int(part) for part in text.split(","))
        except ValueError:
            numbers = []
        if not numbers or numbers[0] < 1 or len(set(numbers)) < len(numbers):
            example = "positive and each once, like 195,1953,3906"
            raise UserError(f"{flag} takes whole numbers, {example}, not '{text}'.")
        return tuple(numbers)

    return parse
