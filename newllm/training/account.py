"""What a run says and writes down of itself: what is in effect at its start, and its figures at its end."""

import contextlib
import time
from datetime import UTC, datetime

from newllm.clock import timed
from newllm.errors import UserError
from newllm.models.baselines import Baseline
from newllm.report.page import artifact_paths, write_artifacts
from newllm.report.record import read_record
from newllm.report.summary import banner, curves, plain, summarize
from newllm.saving.checkpoint import provenance
from newllm.saving.trained import save_model
from newllm.training.effects import unused_lines
from newllm.training.plan import make_plan
from newllm.training.runtime import compile_cost, describe_device, peak_memory_mb
from newllm.training.tracking import start_tracking


def announce(config, runtime, data, model, log, notes):
    """Say and write down what is in effect, before anything trains.

    Args:
        log: RunLog. notes: lines about the checkpoint.
    """
    if config.trackers != "none" and log.writes:
        folder = log.folder.parent / "tracking" / log.run_id
        log.follow = start_tracking(runtime.accelerator, config.trackers, folder, config.to_dict(), log.warn)
    kernel = None
    if isinstance(model, Baseline):
        kernel = model.attention_in_effect(runtime.device, runtime.storage_dtype)
    about = {
        "device": describe_device(runtime),
        "attention": kernel or "none",
        "data": data.notes,
        "fingerprint": data.fingerprint,
        "plan": make_plan(config, len(data.train), model, runtime.device),
    }
    attention = f"attention: {about['attention']}"
    for line in banner(config, about["device"], data, model, about["plan"], [attention, *notes]):
        log.say(line)
    log.log("start", config=config.to_dict(), **about, **provenance())
    for line in unused_lines(config, runtime.device.type == "cpu", data.tokenizer.name):
        log.warn(line)
    for line in notes:
        if line.startswith("warning"):
            log.log("warning", message=line)


@timed("saving")
def leave_model(config, data, model, metrics, log):
    """The trained model in a file of its own, among the run's artefacts."""
    about = {
        "run_id": log.run_id,
        "data_source": data.source,
        "metrics": plain(metrics),
        "data_fingerprint": data.fingerprint,
        **provenance(),
    }
    path = artifact_paths(log.folder.parent, config.model_type, log.run_id)["model"]
    with spared(log):
        save_model(path, model, config, data.tokenizer, about)


def report(config, runtime, data, model, checkpointer, log, predicted_peak_mb):
    """Figures of a complete run, each beside its untrained value, to the console, the record and the page.

    Returns:
        The summary, and the curves of pictures.

    Raises:
        UserError: the last checkpoint is not on the disk.
    """
    results, unsaved = checkpointer.results, checkpointer.unsaved
    last = results.get("phase2") or results["phase1"]
    saved_at = datetime.fromtimestamp(checkpointer.saved_at or time.time(), UTC)
    waited, written = checkpointer.saving_share
    summary = {
        "run_id": log.run_id,
        "date": saved_at.isoformat(timespec="seconds"),
        "device": last.get("device", describe_device(runtime)),  # that the figures were made on
        "commit": provenance()["git_commit"],
        **summarize(config, data, results),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        # Of the sessions that completed a stage, and of this one, which may have trained nothing.
        "peak_memory_mb": max(
            peak_memory_mb(), *(made.get("peak_memory_mb", 0.0) for made in results.values())
        ),
        "peak_memory_mb_predicted": predicted_peak_mb,
        "seconds": checkpointer.seconds,
        "saving_share": waited,
        "saving_share_background": written,
    }
    if runtime.compile:
        summary |= compile_cost()
    log.log("curves", **curves(results))
    log.log("summary", **summary)
    if config.artifacts and log.writes:
        with timed("report"), spared(log):
            log.say(f"report: {write_artifacts(read_record(log.path))['report']}")
    log.log("times", seconds=checkpointer.seconds, **checkpointer.times)
    log.finish(summary, saved_at=checkpointer.saved_at, **_last_place(results, config))
    if unsaved:
        raise UserError(f"the last checkpoint could not be written ({unsaved}): free the disk and run again.")
    return summary | curves(results)


def _last_place(results, config):
    """Where a complete run is, for its status: also on a machine that has not trained it."""
    if "phase2" in results:
        head = results["phase2"]["head"]
        place = dict(stage="phase2", epoch=head["epochs"], epochs=config.phase2_epochs)
        return place | {"best_val_loss": head["loss"]}
    done = results["phase1"]["training"]["phase1_iterations"]
    return dict(stage="phase1", epoch=done, epochs=config.phase1_max_iterations)


@contextlib.contextmanager
def spared(log):
    """Around what the run could do without: a disk that refuses costs that, not the run."""
    try:
        yield
    except OSError as error:
        name = error.filename or "an artefact"
        log.warn(f"warning: {name} cannot be written ({error.strerror or error}); the run goes on")
    except UserError as error:  # the record has gaps, for the same reason
        log.warn(f"warning: no report: {error}")
