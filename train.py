"""Train a model: data, untrained row, Phase 1, Phase 2, report. Run it again and it continues where it was cut off.

python3 train.py                      # values of config.py
python3 train.py --num_samples 781    # every value is also a flag; --help lists them
python3 train.py --dry_run            # everything up to the first step, and what it would take; trains and changes nothing
"""

import copy
import time
from datetime import UTC, datetime

from config import ResidualConfig
from newllm.clock import Clock, timed
from newllm.data.samples import load_data
from newllm.data.tokens import tokenizer_choice
from newllm.errors import UserError, exit_on_user_error
from newllm.evaluate import bpb_by_context, evaluate_contexts
from newllm.flags import parse_args
from newllm.memory import free_memory
from newllm.models.baselines import Baseline, build_model
from newllm.models.network import LanguageModel
from newllm.models.ngram import ngram_rows
from newllm.models.pretrained import load_embedding, require_own_ids, require_peft
from newllm.phases.phase1 import train_phase1
from newllm.phases.phase2 import train_phase2
from newllm.progress import Progress
from newllm.report.page import artifact_paths, write_artifacts
from newllm.report.record import RunLog, new_run_id, read_record
from newllm.report.summary import banner, context_line, curves, plain, summarize
from newllm.saving.checkpoint import Checkpointer, provenance, require_space
from newllm.saving.stop import Interrupt
from newllm.saving.trained import save_model
from newllm.training.dry_run import preview
from newllm.training.effects import unused_lines
from newllm.training.memory_estimate import predicted_peak
from newllm.training.plan import make_plan
from newllm.training.runtime import (
    compile_cost,
    describe_device,
    gpu_utilization,
    open_runtime,
    peak_memory_mb,
)
from newllm.training.tracking import start_tracking


def main(config, dry_run=False, sources=(load_data, load_embedding)):
    """Run all stages that are not complete yet.

    Args:
        dry_run: stop before the first step, having said what a run would do.
        sources: what gives the data and the embedding's vectors, with the arguments of the defaults.

    Returns:
        The summary: what the closing block prints, as a dict, and the curves of pictures; None of a dry run.

    Raises:
        UserError: bad settings, data, checkpoint or a training that diverged.
        Stopped: a signal or max_minutes ended the run early; everything is saved.
    """
    if config.whiten_context and config.model_type == "context" and not config.freeze_context:
        raise UserError(
            "whiten_context whitens contexts that no longer change: use --freeze_context with it."
        )
    if config.context_adapter != "none":
        require_peft()
    with Interrupt(config.max_minutes, config.save_checkpoint) as interrupt, Clock():
        with timed("loading"):
            runtime = open_runtime(config)
        interrupt.alone = runtime.group.size == 1
        with runtime.group.run():
            with timed("loading"):
                data, model, peak = load(config, runtime, *sources)
            if dry_run:
                return preview(config, runtime, data, model, peak)
            with Checkpointer(config, data.fingerprint, new_run_id(), runtime.group) as checkpointer:
                if checkpointer.writes:
                    require_space(checkpointer.folder, model, config, runtime.storage_dtype)
                how = runtime.group.is_main, lambda: checkpointer.owns, gpu_utilization
                with RunLog(config.checkpoint_dir, data.source, checkpointer.run_id, *how) as log:
                    return run_stages(config, runtime, data, model, checkpointer, log, peak)


def load(config, runtime, load_data, load_embedding):
    """(data, model, predicted peak in MB) of a configuration.

    Raises:
        UserError: they cannot be had, or do not fit each other or the other processes.
    """
    with runtime.group.main_first():
        data = load_data(config, Progress)
        pretrained = load_embedding(config.embeddings, data.vocab_size, config.embed_dim)
        require_own_ids(config.embeddings, tokenizer_choice(config))
    runtime.group.require_same("data", data.fingerprint)
    if config.whiten_context and runtime.group.size > 1:
        raise UserError("whiten_context is fitted by one process on all samples: start it without torchrun.")
    peak = predicted_peak(config, data.vocab_size, runtime)
    model = build_model(config, data.vocab_size, pretrained).to(runtime.device)
    model.start_at_frequencies(data.train[:, 1:])
    return data, model, peak


def begin_record(config, runtime, data, model, checkpointer, log):
    """Say and write down what is in effect; returns the line about the device."""
    log.mend(checkpointer.record)
    if config.trackers != "none" and log.writes:
        folder = log.folder.parent / "tracking" / log.run_id
        log.follow = start_tracking(runtime.accelerator, config.trackers, folder, config.to_dict(), log.warn)
    kernel = (
        model.attention_in_effect(runtime.device, runtime.storage_dtype)
        if isinstance(model, Baseline)
        else None
    )
    device, plan = describe_device(runtime), make_plan(config, len(data.train), model, runtime.device)
    for line in banner(
        config, device, data, model, plan, [f"attention: {kernel or 'none'}", *checkpointer.notes]
    ):
        log.say(line)
    about = dict(
        device=device, attention=kernel or "none", data=data.notes, fingerprint=data.fingerprint, plan=plan
    )
    log.log("start", config=config.to_dict(), **about, **provenance())
    log.plan(plan)
    for line in unused_lines(config, runtime.device.type == "cpu", data.tokenizer.name):
        log.warn(line)
    for line in checkpointer.notes:
        if line.startswith("warning"):
            log.log("warning", message=line)
    return device


def run_stages(config, runtime, data, model, checkpointer, log, predicted_peak_mb):
    """The story: untrained row, Phase 1, Phase 2, report."""
    device = begin_record(config, runtime, data, model, checkpointer, log)

    @timed("contexts")
    def measure_contexts():
        log.say("measuring contexts: rank, convergence, memory")
        found = evaluate_contexts(model, data, config, runtime.device, Progress)
        free_memory()  # its probes hold more than training does at small sizes
        return found

    learns_context = bool(model.context_parameters())
    if not checkpointer.is_done("untrained"):
        results = dict(checkpointer.reused)  # what another run of the folder has, to the bit
        if "ngrams" not in results:
            log.say("counting n-grams")
            with timed("n-grams"):
                results["ngrams"] = ngram_rows(data.train.numpy(), data.val.numpy(), data.vocab_size)
        if learns_context and "contexts" not in results:
            results["contexts"] = measure_contexts()
        if learns_context and config.untrained_control and "head" not in results:
            log.say("\n== Untrained network: the same head on contexts that nothing has trained ==")
            control = copy.deepcopy(model)
            control.keep_context_embedding()
            log.say(context_line("untrained", results["contexts"]))
            with timed("untrained control"):
                results["head"] = train_phase2(
                    control, data, config, runtime, log, checkpointer, "untrained", True
                )
            del control
        checkpointer.complete("untrained", model, results)
        runtime.accelerator.free_memory()  # of the optimizers it has prepared
        free_memory()

    if not learns_context and not checkpointer.is_done("phase1"):
        checkpointer.complete("phase1", model, {})
    if not checkpointer.is_done("phase1"):
        log.say("\n== Phase 1: contexts ==")
        with timed("Phase 1"):
            training = train_phase1(model, data, config, runtime, log, checkpointer)
        contexts = measure_contexts()
        log.say(context_line("untrained", checkpointer.results["untrained"]["contexts"]))
        log.say(context_line("phase 1", contexts))
        results = {"training": training, "contexts": contexts, "device": device}
        checkpointer.complete("phase1", model, results | {"peak_memory_mb": peak_memory_mb()})
        model.zero_grad()
        runtime.accelerator.free_memory()
        free_memory()

    if config.phase == "both" and not checkpointer.is_done("phase2"):
        frozen = isinstance(model, LanguageModel) and (config.freeze_context or not learns_context)
        how = (
            f"model type {config.model_type}"
            + f", contexts {'frozen' if frozen else 'fine-tuned'}" * learns_context
        )
        log.say(f"\n== Phase 2: next-token prediction, {how} ==")
        with timed("Phase 2"):
            head = train_phase2(model, data, config, runtime, log, checkpointer, "phase2", frozen)
        results = {"head": head, "device": device}
        if learns_context and not frozen:
            results["contexts"] = measure_contexts()
            log.say(context_line("phase 2", results["contexts"]))
        if isinstance(model, LanguageModel) and not config.whiten_context:
            log.say("measuring what the model uses of its context")
            how = data.token_bytes, runtime.autocast, runtime.device, Progress
            with timed("contexts"):
                results["bpb_by_context"] = bpb_by_context(model, data.val, *how)
        if config.artifacts and config.save_checkpoint and log.writes:
            about = {
                "run_id": log.run_id,
                "data_source": data.source,
                "metrics": plain(head),
                "data_fingerprint": data.fingerprint,
                **provenance(),
            }
            path = artifact_paths(log.folder.parent, config.model_type, log.run_id)["model"]
            with timed("saving"):
                attempt(log, lambda: save_model(path, model, config, data.tokenizer, about))
        checkpointer.complete("phase2", model, results | {"peak_memory_mb": peak_memory_mb()})

    unsaved = checkpointer.unsaved
    waited, written = checkpointer.saving_share
    summary = {
        **identity(log.run_id, device, checkpointer),
        **summarize(config, data, checkpointer.results),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_memory_mb": highest_peak(checkpointer.results),
        "peak_memory_mb_predicted": predicted_peak_mb,
        "seconds": checkpointer.seconds,
        "saving_share": waited,
        "saving_share_background": written,
        **(compile_cost() if runtime.compile else {}),
    }
    log.log("curves", **curves(checkpointer.results))
    log.log("summary", **summary)
    if config.artifacts and log.writes:
        with timed("report"):
            attempt(log, lambda: log.say(f"report: {write_artifacts(read_record(log.path))['report']}"))
    log.log("times", seconds=checkpointer.seconds, **checkpointer.times)
    log.finish(summary, **end_of(config, checkpointer))
    if unsaved:
        raise UserError(f"the last checkpoint could not be written ({unsaved}): free the disk and run again.")
    return summary | curves(checkpointer.results)


def identity(run_id, device, checkpointer):
    """Which run made the figures, when, on what, by which commit; of one that was complete already, as it was then."""
    results = checkpointer.results.get("phase2") or checkpointer.results["phase1"]
    when = datetime.fromtimestamp(checkpointer.saved_at or time.time(), UTC)
    return {
        "run_id": run_id,
        "date": when.isoformat(timespec="seconds"),
        "device": results.get("device", device),
        "commit": provenance()["git_commit"],
    }


def highest_peak(results):
    """Peak memory in MB over the sessions that completed a stage and this one, which may have trained nothing."""
    return max(peak_memory_mb(), *(stage.get("peak_memory_mb", 0.0) for stage in results.values()))


def end_of(config, checkpointer):
    """Where a complete run is, for its status: also where nothing was left to do, on a machine that did not train it."""
    end = {"saved_at": checkpointer.saved_at}
    if head := checkpointer.results.get("phase2", {}).get("head"):
        end |= {
            "stage": "phase2",
            "epoch": head["epochs"],
            "epochs": config.phase2_epochs,
            "best_val_loss": head["loss"],
        }
    elif training := checkpointer.results["phase1"]["training"]:
        end |= {
            "stage": "phase1",
            "epoch": training["phase1_iterations"],
            "epochs": config.phase1_max_iterations,
        }
    return end


def attempt(log, write):
    """Call a function that writes what the run could do without: a disk that refuses costs that, not the run."""
    try:
        write()
    except OSError as error:
        log.warn(
            f"warning: {error.filename or 'an artefact'} cannot be written ({error.strerror or error}); the run goes on"
        )
    except UserError as error:  # the record has gaps, for the same reason
        log.warn(f"warning: no report: {error}")


if __name__ == "__main__":
    with exit_on_user_error():
        help_text = "everything up to the first step: what is in effect, memory, disk, checkpoint; only the data's cache is written"
        flag = dict(action="store_true", help=help_text)
        settings, arguments = parse_args(
            ResidualConfig,
            description=__doc__.splitlines()[0],
            extra=lambda parser: parser.add_argument("--dry_run", **flag),
        )
        main(settings, arguments.dry_run)
