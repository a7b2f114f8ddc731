"""The runs of a command that makes several, and a small file that tells `scripts.status` how far it is."""

import json
from pathlib import Path

from newllm.errors import UserError
from newllm.report.record import CUT_OFF, is_gone, this_process, write_fields
from newllm.report.summary import plain

SERIES_NAME = "series.json"


def make_series(folder, runs, work, done=None):
    """Make several runs, one after the other; one that fails keeps no other from being made.

    `<folder>/series.json` is replaced at each turn, for those who watch. Nothing reads there what is done:
    the runs themselves know that, so a series may be cut off anywhere.

    Args:
        folder: an existing folder.
        runs: {name: {"size": cost relative to the others', "folder": where the run lies in this one}}.
        work: function of a name that makes the run and returns its summary.
        done: {name: summary} of runs that need no work.

    Returns the summaries of all runs, in order. UserError where runs failed; all others are done. Anything
    else that `work` raises ends the series.
    """
    summaries, failures = dict(done or {}), []
    states = {}
    for name, run in runs.items():
        status = "done" if name in summaries else "pending"
        states[name] = {"name": name, "status": status, "metrics": plain(summaries.get(name, {})), **run}
    for name, state in states.items():
        if state["status"] == "done":
            continue
        state["status"] = "running"
        _write(folder, states)
        try:
            summaries[name] = work(name)
            state |= {"status": "done", "metrics": plain(summaries[name])}
        except UserError as error:
            state["status"] = "failed"
            failures.append(f"{name} failed: {error}")
            print(failures[-1], flush=True)
        finally:
            if state["status"] == "running":
                state["status"] = "pending"
            fields = _write(folder, states)
        print(progress_line(progress(fields)), flush=True)
    if failures:
        raise UserError(
            f"{len(failures)} of {len(states)} runs failed, the first of them ({failures[0].rstrip('.')}): "
            "mend that and run the same command again, which makes only what is missing."
        )
    return [summaries[name] for name in runs]


def _write(folder, states):
    fields = this_process() | {"runs": list(states.values())}
    write_fields(Path(folder) / SERIES_NAME, fields)
    return fields


def read_series(folder):
    """Content of a folder's series.json with the values of `progress`; None without the file.

    UserError where the file is there and cannot be read.
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
    """How far a series is: state, total, done, failed, remaining, elapsed_s (of runs done), eta_s or None."""

    def such(*statuses):
        return [run for run in fields["runs"] if run["status"] in statuses]

    done, failed, left, eta = such("done"), such("failed"), such("running", "pending"), None
    state = CUT_OFF if left or failed else "complete"
    if such("running") and not is_gone(fields):
        state = "running"
    seconds = sum(run["metrics"]["seconds"] for run in done)
    if done:
        eta = seconds * sum(run["size"] for run in left) / sum(run["size"] for run in done)
    counts = {"total": len(fields["runs"]), "done": len(done), "failed": len(failed), "remaining": len(left)}
    return {"state": state, **counts, "elapsed_s": seconds, "eta_s": eta}


def progress_line(counts):
    """`Runs: 5, 2 done, 0 failed, 3 remaining | Elapsed: 312s | ETA: 1100s`."""
    eta = "unknown" if counts["eta_s"] is None else f"{counts['eta_s']:.0f}s"
    parts = ", ".join(f"{counts[name]} {name}" for name in ("done", "failed", "remaining"))
    return f"Runs: {counts['total']}, {parts} | Elapsed: {counts['elapsed_s']:.0f}s | ETA: {eta}"
