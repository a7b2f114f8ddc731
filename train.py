"""Train a model: data, untrained row, Phase 1, Phase 2, report. Run it again and it continues where it was cut off.

python3 train.py                      # values of config.py
python3 train.py --num_samples 781    # every value is also a flag; --help lists them
"""

import copy

from config import ResidualConfig
from newllm.config import parse_args
from newllm.data.dataset import load_data
from newllm.errors import UserError, exit_on_user_error
from newllm.evaluate import bpb_by_context, evaluate_contexts
from newllm.interrupt import Interrupt
from newllm.memory import free_memory
from newllm.models.adapter import require_peft
from newllm.models.baselines import Baseline, build_model
from newllm.models.language_model import LanguageModel
from newllm.models.ngram import ngram_rows
from newllm.models.pretrained import load_embedding
from newllm.progress import Progress
from newllm.reporting.artifacts import artifact_paths, write_artifacts
from newllm.reporting.banner import banner
from newllm.reporting.record import read_record
from newllm.reporting.runlog import RunLog, new_run_id
from newllm.reporting.summary import context_line, curves, plain, summarize
from newllm.training.checkpoint import Checkpointer
from newllm.training.device import compile_cost, describe_device, open_runtime, peak_memory_mb
from newllm.training.memory_estimate import predicted_peak
from newllm.training.phase1 import train_phase1
from newllm.training.phase2 import train_phase2
from newllm.training.state import provenance, require_space
from newllm.training.tracking import start_tracking
from newllm.training.trained import save_model


def main(config, sources=(load_data, load_embedding)):
    """Run all stages that are not complete yet.

    Args:
        sources: what gives the data and the embedding's vectors, with the arguments of the defaults.

    Returns:
        The summary: what the closing block prints, as a dict, and the curves of pictures.

    Raises:
        UserError: bad settings, data, checkpoint or a training that diverged.
        Stopped: a signal or max_minutes ended the run early; everything is saved.
    """
    load, embed = sources
    if config.whiten_context and config.model_type == "context" and not config.freeze_context:
        raise UserError("whiten_context whitens contexts that no longer change: use --freeze_context with it.")
    if config.context_adapter != "none":
        require_peft()
    with Interrupt(config.max_minutes) as interrupt:
        runtime = open_runtime(config)
        interrupt.alone = runtime.group.size == 1
        with runtime.group.run():
            with runtime.group.main_first():
                data = load(config, Progress)
                pretrained = embed(config.embeddings, data.vocab_size, config.embed_dim)
            runtime.group.require_same("data", data.fingerprint)
            peak = predicted_peak(config, data.vocab_size, runtime)
            model = build_model(config, data.vocab_size, pretrained).to(runtime.device)
            model.start_at_frequencies(data.train[:, 1:])
            with Checkpointer(config, data.fingerprint, new_run_id(), runtime.group) as checkpointer:
                if checkpointer.writes:
                    require_space(checkpointer.folder, model, config, runtime.storage_dtype)
                return run_stages(config, runtime, data, model, checkpointer, peak)


def run_stages(config, runtime, data, model, checkpointer, predicted_peak_mb):
    """The story: untrained row, Phase 1, Phase 2, report."""
    log = RunLog(config.checkpoint_dir, data.source, checkpointer.run_id, runtime.group.is_main)
    if config.trackers != "none" and log.writes:
        folder = log.folder.parent / "tracking" / log.run_id
        log.follow = start_tracking(runtime.accelerator, config.trackers, folder, config.to_dict(), log.warn)
    kernel = model.attention_in_effect(runtime.device, runtime.storage_dtype) if isinstance(model, Baseline) else None
    notes = [f"attention: {kernel}"] * bool(kernel) + checkpointer.notes
    for line in banner(config, describe_device(runtime), data, model, notes):
        log.say(line)
    log.log(
        "start", config=config.to_dict(), device=describe_device(runtime), data=data.notes, fingerprint=data.fingerprint,
        **provenance(),
    )  # fmt: skip

    def measure_contexts():
        log.say("measuring contexts: rank, convergence, memory")
        found = evaluate_contexts(model, data, config, runtime.device, Progress)
        free_memory()  # its probes hold more than training does at small sizes
        return found

    learns_context = bool(model.context_parameters())
    if not checkpointer.is_done("untrained"):
        log.say("counting n-grams")
        results = {"ngrams": ngram_rows(data.train.numpy(), data.val.numpy(), data.vocab_size)}
        if learns_context:
            results["contexts"] = measure_contexts()
        if learns_context and config.untrained_control:
            log.say("\n== Untrained network: the same head on contexts that nothing has trained ==")
            control = copy.deepcopy(model)
            control.keep_context_embedding()
            log.say(context_line("untrained", results["contexts"]))
            results["head"] = train_phase2(control, data, config, runtime, log, checkpointer, "untrained", True)
            del control
        checkpointer.complete("untrained", model, results)
        runtime.accelerator.free_memory()  # of the optimizers it has prepared
        free_memory()

    if not learns_context and not checkpointer.is_done("phase1"):
        checkpointer.complete("phase1", model, {})
    if not checkpointer.is_done("phase1"):
        log.say("\n== Phase 1: contexts ==")
        training = train_phase1(model, data, config, runtime, log, checkpointer)
        contexts = measure_contexts()
        log.say(context_line("untrained", checkpointer.results["untrained"]["contexts"]))
        log.say(context_line("phase 1", contexts))
        checkpointer.complete("phase1", model, {"training": training, "contexts": contexts})
        model.zero_grad()
        runtime.accelerator.free_memory()
        free_memory()

    if config.phase == "both" and not checkpointer.is_done("phase2"):
        frozen = isinstance(model, LanguageModel) and (config.freeze_context or not learns_context)
        how = f"model type {config.model_type}" + f", contexts {'frozen' if frozen else 'fine-tuned'}" * learns_context
        log.say(f"\n== Phase 2: next-token prediction, {how} ==")
        head = train_phase2(model, data, config, runtime, log, checkpointer, "phase2", frozen)
        results = {"head": head}
        if learns_context and not frozen:
            results["contexts"] = measure_contexts()
            log.say(context_line("phase 2", results["contexts"]))
        if isinstance(model, LanguageModel) and not config.whiten_context:
            log.say("measuring what the model uses of its context")
            how = data.token_bytes, runtime.autocast, runtime.device, Progress
            results["bpb_by_context"] = bpb_by_context(model, data.val, *how)
        if config.artifacts and config.save_checkpoint and log.writes:
            about = {"run_id": log.run_id, "data_source": data.source, "metrics": plain(head), **provenance()}
            path = artifact_paths(log.folder.parent, config.model_type, log.run_id)["model"]
            attempt(log, lambda: save_model(path, model, config, data.tokenizer, about))
        checkpointer.complete("phase2", model, results)

    summary = summarize(config, data, checkpointer.results)
    unsaved = checkpointer.unsaved
    waited, written = checkpointer.saving_share
    summary |= {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_memory_mb": peak_memory_mb(),
        "peak_memory_mb_predicted": predicted_peak_mb,
        "seconds": checkpointer.seconds,
        "saving_share": waited,
        "saving_share_background": written,
        **(compile_cost() if runtime.compile else {}),
    }
    log.log("curves", **curves(checkpointer.results))
    log.log("summary", **summary)
    if config.artifacts and log.writes:
        attempt(log, lambda: log.say(f"report: {write_artifacts(read_record(log.path))['report']}"))
    log.finish(summary)
    if unsaved:
        raise UserError(f"the last checkpoint could not be written ({unsaved}): free the disk and run again.")
    return summary | curves(checkpointer.results)


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
        main(parse_args(ResidualConfig, description=__doc__.splitlines()[0])[0])
