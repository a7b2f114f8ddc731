"""The runs of a command that makes several: which are done, and their figures, in a file that outlives the command."""

import contextlib
import json
import math
import time
from datetime import UTC, datetime
from pathlib import Path

from newllm.errors import UserError
from newllm.report.record import CUT_OFF, is_gone, this_process
from newllm.saving.files import write_text

STATE_NAME = "sweep_state.json"
KEPT = ("status", "metrics", "seconds", "time")  # of a run that an earlier start of the sweep knew
NOT_FINITE = ("nan", "inf", "-inf")  # JSON has no such numbers: they are kept as text


class Sweep:
    """Runs one after the other; `<folder>/sweep_state.json` is replaced atomically whenever one begins or ends.

    In that file each run has: index, name, size, status (pending, running, done or failed), folder, metrics, seconds,
    time of its last change, and the error of a failed one.

    Args:
        folder: an existing folder; each run gets one of its own in it, by its name.
        settings: plain values that shape the figures of all runs; with others the sweep is another one.
        sizes: {name of a run: its cost relative to the others'}, in the order in which to run. May differ from those of an
            earlier start: what that has done stays in the file.
        fresh: begin all runs anew, whatever the file says.
        made: function of a run's name to its metrics, None when it is still to be made; it then says what is done, not the
            file.

    Raises:
        UserError: the file is of another sweep, or cannot be read.
    """

    def __init__(self, folder, settings, sizes, fresh=False, made=None):
        self.path, self.settings, self._warned = Path(folder) / STATE_NAME, settings, False
        self.runs = [
            {"index": index, "name": name, "size": size, "status": "pending", "folder": str(Path(folder) / name),
             "metrics": None, "seconds": 0.0, "time": None}
            for index, (name, size) in enumerate(sizes.items())
        ]  # fmt: skip
        found = None if fresh else _read(self.path)
        if found:
            self._require_same(found)
        earlier = {run["name"]: run for run in found["runs"]} if found else {}
        self._others = [
            run for run in earlier.values() if run["name"] not in sizes and run["status"] == "done"
        ]
        for run in self.runs:
            run |= {key: earlier[run["name"]][key] for key in KEPT if run["name"] in earlier}
            if made and not fresh:
                run["metrics"] = made(run["name"])
                run["status"] = "done" if run["metrics"] else "pending"
            run["status"] = "done" if run["status"] == "done" else "pending"
        self._write()

    def finish(self, work):
        """Do the runs that are not done, and keep no checkpoints of those that are: a sweep is made for its figures.

        Args:
            work: function of a run (the dict above) that returns its metrics, a flat dict of plain values. Called again
                with a run that was cut off, it may go on from what it finds in the run's folder.

        Returns:
            The metrics of all runs, in order.

        Raises:
            UserError: runs failed; all others are done. Anything else that `work` raises ends the sweep where it is.
        """
        for run in self.runs:
            if run["status"] != "done":
                self._do(run, work)
                print(progress_line(progress(self.runs)), flush=True)
            if run["status"] == "done":
                _discard_checkpoints(Path(run["folder"]))
        if failed := [run for run in self.runs if run["status"] == "failed"]:
            name, error = failed[0]["name"], failed[0]["error"].rstrip(".")
            raise UserError(
                f"{len(failed)} of {len(self.runs)} runs failed, the first of them ({name}) because {error}: mend that "
                "and run the same command again, which makes only what is missing."
            )
        return [{name: _thawed(value) for name, value in run["metrics"].items()} for run in self.runs]

    def _do(self, run, work):
        run.pop("error", None)
        self._change(run, status="running")
        started = time.monotonic()
        try:
            metrics = work(run)
        except UserError as error:
            self._change(
                run, status="failed", error=str(error), seconds=run["seconds"] + time.monotonic() - started
            )
            print(f"{run['name']} failed: {error}", flush=True)
        except BaseException:
            self._change(run, status="pending", seconds=run["seconds"] + time.monotonic() - started)
            raise
        else:
            # A run that tells its own seconds counts sessions that were killed; here nobody was left to do so.
            seconds = max(run["seconds"] + time.monotonic() - started, metrics.get("seconds", 0.0))
            frozen = {name: _frozen(value) for name, value in metrics.items()}
            self._change(run, status="done", metrics=frozen, seconds=seconds)

    def _change(self, run, **fields):
        run |= fields | {"time": datetime.now(UTC).isoformat(timespec="seconds")}
        self._write()

    def _write(self):
        runs = self._others + self.runs
        state = this_process() | {"settings": self.settings, "runs": runs}
        try:
            write_text(self.path, json.dumps(state, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            if not self._warned:
                reason = error.strerror or error
                print(
                    f"warning: {self.path} cannot be written ({reason}); cut off now, the sweep would repeat runs",
                    flush=True,
                )
            self._warned = True

    def _require_same(self, found):
        before, now = found["settings"], self.settings
        changed = [
            f"{name} {before.get(name)!r} -> {now.get(name)!r}"
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise UserError(
                f"{self.path} is of another sweep ({', '.join(changed)}): choose another --checkpoint_dir, restore "
                "these settings, or start afresh with --no-load_checkpoint."
            )


def read_sweep(folder):
    """Content of a folder's sweep_state.json with the `state` now and the values of `progress`; None without the file.

    Raises:
        UserError: the file is there and cannot be read.
    """
    fields = _read(Path(folder) / STATE_NAME)
    if fields is None:
        return None
    statuses, alive = {run["status"] for run in fields["runs"]}, not is_gone(fields)
    if statuses == {"done"}:
        state = "complete"
    elif alive and "running" in statuses:
        state = "running"
    else:
        state = CUT_OFF
    return {"state": state, **progress(fields["runs"], alive), **fields}


def progress(runs, alive=True):
    """How far a sweep is: total, done, failed, remaining (runs), elapsed_s, and eta_s (None before a run is done).

    Args:
        alive: whether time goes on for the run in hand.
    """
    done, failed, left = [], [], []
    for run in runs:
        {"done": done, "failed": failed}.get(run["status"], left).append(run)
    begun = [datetime.fromisoformat(run["time"]) for run in left if alive and run["status"] == "running"]
    spent = sum((datetime.now(UTC) - time).total_seconds() for time in begun)
    eta = None
    if done:
        seconds_per_size = sum(run["seconds"] for run in done) / sum(run["size"] for run in done)
        eta = max(0.0, seconds_per_size * sum(run["size"] for run in left) - spent)
    return {
        "total": len(runs),
        "done": len(done),
        "failed": len(failed),
        "remaining": len(left),
        "elapsed_s": sum(run["seconds"] for run in runs) + spent,
        "eta_s": eta,
    }


def progress_line(counts):
    """`Sweep: 5 runs, 2 done, 0 failed, 3 remaining | Elapsed: 312s | ETA: 1100s`."""
    eta = "unknown" if counts["eta_s"] is None else f"{counts['eta_s']:.0f}s"
    runs = ", ".join(f"{counts[name]} {name}" for name in ("done", "failed", "remaining"))
    return f"Sweep: {counts['total']} runs, {runs} | Elapsed: {counts['elapsed_s']:.0f}s | ETA: {eta}"


def sweep_lines(fields):
    """What a person reads: how far the sweep is, and a line for each run."""
    runs = [
        f"  {run['name']}: {run['status']}, {run['seconds']:.0f} s, {run['folder']}" for run in fields["runs"]
    ]
    return [f"{progress_line(fields)} ({fields['state']})", *runs]


def _discard_checkpoints(folder):
    for path in (*folder.glob("model_*.pt"), folder / "manifest.json"):
        with contextlib.suppress(OSError):
            path.unlink()


def _read(path):
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return fields | {"settings": dict(fields["settings"]), "runs": list(fields["runs"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): move it away to begin a sweep anew.") from error


def _frozen(value):
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _thawed(value):
    return float(value) if value in NOT_FINITE else value
