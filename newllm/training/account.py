"""What a run says and writes down of itself: in effect at its start, and its figures at its end."""

import contextlib
import dataclasses
import time
from datetime import UTC, datetime
from pathlib import Path

from accelerate.tracking import filter_trackers

from newllm.clock import timed
from newllm.errors import UserError
from newllm.models.baselines import Baseline
from newllm.report.page import artifact_paths, write_artifacts
from newllm.report.record import read_record
from newllm.report.summary import banner, curves, plain, summarize
from newllm.saving.checkpoint import only_reading, provenance, require_space
from newllm.saving.files import second_folder, usable_folder
from newllm.saving.guard import holder
from newllm.saving.runs import newest_state
from newllm.saving.trained import save_model
from newllm.training.memory_estimate import usable_memory, verdict
from newllm.training.plan import make_plan, unused_lines
from newllm.training.runtime import compile_cost, describe_device, peak_memory_mb


def in_effect(config, runtime, data, model, notes):
    """(what the record keeps of what is in effect, the lines that say it, warnings); notes: further lines."""
    kernel = None
    if isinstance(model, Baseline):
        kernel = model.attention_in_effect(runtime.device, runtime.storage_dtype)
    about = dict(
        device=describe_device(runtime), attention=kernel or "none", data=data.notes,
        fingerprint=data.fingerprint, plan=make_plan(config, len(data.train), model, runtime),
    )  # fmt: skip
    notes = [f"attention: {about['attention']}", *notes]
    lines = banner(config, about["device"], data, model, about["plan"], notes)
    return about, lines, unused_lines(config, runtime.device.type == "cpu", data.tokenizer.name)


def announce(config, runtime, data, model, log, notes):
    """Say and write down what is in effect, before anything trains; notes: lines about the checkpoint."""
    if config.trackers != "none" and log.writes:
        folder = log.folder.parent / "tracking" / log.run_id
        log.follow = start_tracking(runtime.accelerator, config.trackers, folder, config.to_dict(), log.warn)
    about, lines, unused = in_effect(config, runtime, data, model, notes)
    for line in lines:
        log.say(line)
    log.log("start", config=config.to_dict(), **about, **provenance())
    for line in unused:
        log.warn(line)
    for line in notes:
        if line.startswith("warning"):
            log.log("warning", message=line)


def start_tracking(accelerator, name, folder, config, warn):
    """Begin to send the rows of a run's record to a tracker, through accelerate; it cannot stop a run.

    Args:
        folder: the tracker's. warn: function of a line.

    Returns:
        Function of (stage, values) for RunLog. At the first failure, also the last, `warn` gets a line.
    """

    def attempt(function, *arguments):
        try:
            function(*arguments)
        except Exception as error:  # whatever a service or its client raises
            accelerator.trackers.clear()
            warn(f"warning: {name} failed ({type(error).__name__}: {error}); the run goes on without it")

    def begin():
        accelerator.project_configuration.set_directories(str(folder))
        accelerator.log_with = filter_trackers(name, str(folder))
        if not accelerator.log_with:
            raise ImportError(f"pip install {name}")
        accelerator.init_trackers("newllm", config)

    def follow(stage, values):
        numbers = {f"{stage}/{key}": value for key, value in values.items() if type(value) in (int, float)}
        step = values.get("steps", values.get("iteration", values.get("epoch")))  # the finest of its counts
        if step is not None:
            attempt(accelerator.log, numbers, step)

    attempt(begin)
    return follow


def preview(config, runtime, data, model, peak):
    """Say what a run would do, up to its first step; nothing is written but the data's cache.

    Args:
        peak: predicted MB.

    Raises:
        UserError: what a run would be refused for.
    """
    folder = Path(config.checkpoint_dir)
    notes = _checkpoint_lines(config, data.fingerprint, runtime.group)
    _, lines, unused = in_effect(config, runtime, data, model, notes)
    print(*lines, *unused, sep="\n")
    print(f"memory: predicted peak {verdict(peak, usable_memory(config, runtime))}")
    if config.save_checkpoint:
        existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
        require_space(existing, model, config, runtime.storage_dtype)
        print(f"disk: the checkpoints of the run fit into {folder}")
    print(f"dry run: nothing was trained, and nothing was written outside of {config.cache_dir}")


def _checkpoint_lines(config, fingerprint, group):
    """What the run would find in its folder, or in the second copies where they are newer; touches nothing.

    Raises:
        UserError: the folder is in use, or damaged as a whole.
    """
    folder = place = usable_folder(config.checkpoint_dir, "checkpoint_dir", make=False)
    if config.save_checkpoint and (in_use := holder(folder)):
        raise UserError(in_use)
    if config.save_checkpoint and config.backup_dir:
        copies, found = second_folder(config.backup_dir, folder, "backup_dir"), newest_state(folder)
        copy = newest_state(copies)
        if copy and (not found or copy["save_number"] > found["save_number"]):
            place = copies
    with only_reading(dataclasses.replace(config, checkpoint_dir=str(place)), fingerprint, group) as found:
        said = found.notes or ["none, the run begins from the start"]
        return [f"checkpoint in {place}: {line}" for line in said]


@timed("saving")
def leave_model(config, data, model, metrics, log, retrieval):
    """The trained model in a file of its own, among the run's artefacts, with what it looks up (or None)."""
    about = dict(run_id=log.run_id, data_source=data.source, data_fingerprint=data.fingerprint)
    about |= {"metrics": plain(metrics)} | provenance()
    path = artifact_paths(log.folder.parent, config.model_type, log.run_id)["model"]
    with spared(log):
        save_model(path, model, config, data.tokenizer, about, retrieval)


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
    seconds, times = checkpointer.seconds, checkpointer.times
    # Of the sessions that completed a stage, and of this one, which may have trained nothing.
    peaks = [made["peak_memory_mb"] for made in results.values() if made]
    summary = {
        "run_id": log.run_id,
        "date": saved_at.isoformat(timespec="seconds"),
        "device": last["device"],  # that the figures were made on
        "commit": provenance()["git_commit"],
        **summarize(config, data, results),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_memory_mb": max(peak_memory_mb(), *peaks),
        "peak_memory_mb_predicted": predicted_peak_mb,
        "seconds": seconds,
        "saving_share": times["parts"].get("saving", 0.0) / seconds,  # training waited for a save
        "saving_share_background": times["save_seconds"] / seconds,  # a save was being written
    }
    if config.looks_up:
        summary["seconds_retrieval"] = times["parts"].get("retrieval", 0.0)
    if runtime.compile:
        summary |= compile_cost()
    log.log("curves", **curves(results))
    log.log("summary", **summary)
    if config.artifacts and log.writes:
        with timed("report"), spared(log):
            log.say(f"report: {write_artifacts(read_record(log.path))['report']}")
    log.log("times", seconds=checkpointer.seconds, **checkpointer.times)
    log.finish(plain(summary), saved_at=checkpointer.saved_at, **_last_place(results, config))
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
    """Around what the run could do without: a disk that refuses, or a record with gaps, costs that alone."""
    try:
        yield
    except OSError as error:
        name = error.filename or "an artefact"
        log.warn(f"warning: {name} cannot be written ({error.strerror or error}); the run goes on")
    except UserError as error:
        log.warn(f"warning: no report: {error}")
