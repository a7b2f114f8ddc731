"""Train a model: data, untrained row, Phase 1, Phase 2, retrieval, report. Run it again and it continues.

python3 train.py                      # values of config.py
python3 train.py --num_samples 781    # every value is also a flag; --help lists them
python3 train.py --dry_run            # what a run would do and take; trains and changes nothing
"""

import copy
from dataclasses import dataclass

from config import ResidualConfig
from newllm.clock import Clock, timed
from newllm.config import (
    DataSettings,
    MachineSettings,
    ModelSettings,
    Phase1Settings,
    Phase2Settings,
    RetrievalSettings,
)
from newllm.data.samples import TokenData, load_data
from newllm.data.tokens import tokenizer_choice
from newllm.errors import UserError, exit_on_user_error
from newllm.evaluate import bpb_by_context, evaluate_contexts
from newllm.flags import parse_args
from newllm.generate import samples
from newllm.memory import free_memory
from newllm.models.baselines import Baseline, build_model
from newllm.models.network import TokenPredictor
from newllm.models.pretrained import load_embedding, require_own_ids, require_peft
from newllm.phases.phase1 import Phase1
from newllm.phases.phase2 import Phase2
from newllm.phases.retrieval import by_contexts, counting, retrieval_of
from newllm.progress import Progress
from newllm.report.record import RunLog, new_run_id
from newllm.report.summary import TITLES, context_line, retrieval_line
from newllm.retrieval.ngram import ngram_rows
from newllm.saving.checkpoint import Checkpointer, require_space
from newllm.saving.stop import Interrupt
from newllm.saving.teachers import identified, open_teachers
from newllm.saving.trained import model_digest
from newllm.training.account import announce, leave_model, preview, report, spared
from newllm.training.loop import EpochLoop
from newllm.training.memory_estimate import predicted_peak
from newllm.training.runtime import (
    Runtime,
    describe_device,
    gpu_utilization,
    open_runtime,
    peak_memory_mb,
    skip_loaded_code,
)


def main(config, dry_run=False):
    """Run all stages that are not complete yet.

    Args:
        dry_run: stop before the first step, having said what a run would do.

    Returns:
        The summary: what the closing block prints, as a dict, and the curves of pictures; None of a dry run.

    Raises:
        UserError: bad settings, data, checkpoint or a training that diverged.
        Stopped: a signal or max_minutes ended the run early; everything is saved.
    """
    Clock.current = Clock()
    config = identified(config)
    with Interrupt(config.max_minutes) as interrupt:
        with timed("loading"):
            runtime = open_runtime(config.part(MachineSettings))
        group = runtime.group
        interrupt.alone = group.size == 1
        with group.run():
            with timed("loading"):
                data, model, peak = load(config, runtime)
                skip_loaded_code()
            if dry_run:
                return preview(config, runtime, data, model, peak)
            with Checkpointer(config, data.fingerprint, new_run_id(), group) as checkpointer:
                if checkpointer.writes:
                    require_space(checkpointer.folder, model, config, runtime.storage_dtype)
                log = RunLog(
                    config.checkpoint_dir,
                    data.source,
                    checkpointer.run_id,
                    writes=group.is_main,
                    owns=lambda: checkpointer.owns,
                    gauge=gpu_utilization,
                )
                with log:
                    log.mend(checkpointer.record)
                    announce(config, runtime, data, model, log, checkpointer.notes)
                    run = Run(config, runtime, data, model, checkpointer, log)
                    run.untrained_row()
                    run.phase1()
                    run.phase2()
                    run.retrieval()
                    return report(config, runtime, data, model, checkpointer, log, peak)


def load(config, runtime):
    """(data, model, predicted peak in MB) of a configuration.

    Raises:
        UserError: they cannot be had, or do not fit each other or the other processes.
    """
    if config.whiten_context and config.model_type == "context" and not config.freeze_context:
        raise UserError("whiten_context whitens contexts that no longer change: use --freeze_context too.")
    if config.whiten_context and runtime.group.size > 1:
        raise UserError("whiten_context is fitted by one process on all samples: start it without torchrun.")
    if config.context_adapter != "none":
        require_peft()
    with runtime.group.main_first():
        settings = config.part(DataSettings)
        data = load_data(settings, Progress)
        pretrained = load_embedding(config.embeddings, data.vocab_size, config.embed_dim)
        require_own_ids(config.embeddings, tokenizer_choice(settings))
    open_teachers(config, data.fingerprint, runtime.device)  # whoever cannot be had is said now
    runtime.group.require_same("data", data.fingerprint)
    peak = predicted_peak(config, data.vocab_size, runtime)
    return data, untrained_model(config, runtime, data, pretrained), peak


def untrained_model(config, runtime, data, pretrained):
    """The network as it is before any training; pretrained: token vectors, or None."""
    model = build_model(config.part(ModelSettings), data.vocab_size, pretrained).to(runtime.device)
    model.start_at_frequencies(data.train[:, 1:])
    return model


@dataclass
class Run:
    """The stages of a run. One that an earlier session has completed is left out."""

    config: ResidualConfig
    runtime: Runtime
    data: TokenData
    model: TokenPredictor
    checkpointer: Checkpointer
    log: RunLog

    @property
    def learns_context(self):
        return bool(self.model.context_parameters())

    @property
    def compares_contexts(self):
        """Whether contexts are learned, and places of texts compared."""
        return self.learns_context and bool({"cache", "knn"} & set(self.config.looks_up))

    def untrained_row(self):
        """What every later figure stands beside: counting, and the same network and head without Phase 1."""
        data, log = self.data, self.log
        if self.checkpointer.is_done("untrained"):
            return
        results = dict(self.checkpointer.reused)  # what another run of the folder has, to the bit
        if "ngrams" not in results:
            log.say("counting n-grams")
            with timed("n-grams"):
                results["ngrams"] = ngram_rows(data.train.numpy(), data.val.numpy(), data.vocab_size)
        if self.learns_context and "contexts" not in results:
            results["contexts"] = self.measure_contexts()
        if "by_contexts" not in results:
            results |= self.look_up_by_contexts(self.model)
        control = None
        needed = {"head", "retrieval"} if self.config.looks_up else {"head"}
        if self.learns_context and self.config.untrained_control and not needed <= results.keys():
            if "head" in results:  # which another run has trained
                control = self.saved_control()
            control = control or self.trained_control(results)
        self.look_up_untrained(results, control)
        self.complete(results)

    def trained_control(self, results):
        """The untrained network with a head trained on it, whose figures the results get."""
        self.log.say("\n== Untrained network: the same head on contexts that nothing has trained ==")
        control = copy.deepcopy(self.model)
        control.keep_context_embedding()
        self.log.say(context_line("untrained", results["contexts"]))
        results["head"] = self.train_head(control, "untrained", freeze_context=True)
        return control

    def saved_control(self):
        """The same as a run of this folder has left it, or None."""
        control = copy.deepcopy(self.model)
        control.keep_context_embedding()
        return control if self.checkpointer.load_control(control) else None

    def look_up_untrained(self, results, control):
        """Stand beside the own retrieval: one without any network, one with the control (or None)."""
        settings = self.config.part(RetrievalSettings)
        if not self.config.looks_up:
            return
        if "counting" not in results:
            self.log.say("looking up without a network: n-grams, the text so far, the training text")
            with timed("retrieval"):
                figures = self.runtime.group.by_main(lambda: counting(self.data, settings))
                results["counting"] = self.runtime.group.decided(figures)
        if control is not None and "retrieval" not in results:
            _, results["retrieval"] = self.look_up(control)

    def phase1(self):
        """The context map by sweeps, without labels."""
        if self.checkpointer.is_done("phase1"):
            return
        results = {}
        if self.learns_context:
            self.log.say("\n== Phase 1: contexts ==")
            settings, folder = self.config.part(Phase1Settings), self.checkpointer.folder
            training = self.train(Phase1(self.model, self.data.train, settings, self.runtime, folder))
            contexts = self.measure_contexts()
            self.log.say(context_line("untrained", self.checkpointer.results["untrained"]["contexts"]))
            self.log.say(context_line("phase 1", contexts))
            results = {"training": training, "contexts": contexts, "device": describe_device(self.runtime)}
            results |= self.look_up_by_contexts(self.model)
        self.complete(results)

    def phase2(self):
        """The language model on these contexts; the best of its epochs is kept."""
        config, runtime, data, model, log = self.config, self.runtime, self.data, self.model, self.log
        if config.phase != "both" or self.checkpointer.is_done("phase2"):
            return
        has_steps = not isinstance(model, Baseline)
        frozen = has_steps and (config.freeze_context or not self.learns_context)
        kind = f"model type {config.model_type}"
        if self.learns_context:
            kind += f", contexts {'frozen' if frozen else 'fine-tuned'}"
        log.say(f"\n== Phase 2: next-token prediction, {kind} ==")
        head = self.train_head(model, "phase2", frozen)
        results = {"head": head, "device": describe_device(runtime)}
        if self.learns_context and not frozen:
            results["contexts"] = self.measure_contexts()
            log.say(context_line("phase 2", results["contexts"]))
        if has_steps and not config.whiten_context:
            log.say("measuring what the model uses of its context")
            with timed("contexts"):
                results["bpb_by_context"] = bpb_by_context(
                    model, data.val, data.token_bytes, runtime.autocast, runtime.device, Progress
                )
        self.complete(results)

    def retrieval(self):
        """What the model looks up beside its own prediction: built, fitted, kept beside the weights."""
        config, log = self.config, self.log
        if config.phase != "both":
            return
        if self.checkpointer.is_done("retrieval"):
            self.mend_retrieval()
            return
        self.checkpointer.restore("retrieval", self.model)
        results, found = {}, None
        if config.looks_up:
            log.say("\n== Retrieval: what was read, looked up ==")
            log.enter("retrieval")
            self.complete_untrained_row()
            found, results = self.look_up(self.model, parts=True)
            results["model"] = model_digest(self.model)
            log.say(retrieval_line(results))
            self.keep(found)
        results |= self.write_samples(found)
        if config.artifacts and config.save_checkpoint and log.writes:
            head = self.checkpointer.results["phase2"]["head"]
            leave_model(config, self.data, self.model, head, log, found)
        self.complete(results)

    def complete_untrained_row(self):
        """A run that began with retrieval "none" has a row without it, which gets what can be had of that."""
        row, control = self.checkpointer.results["untrained"], None
        if "head" in row and "retrieval" not in row:
            control = self.saved_control()
            if control is None:
                self.log.warn("warning: the untrained control's weights are gone: no retrieval beside it")
        self.look_up_untrained(row, control)
        if self.compares_contexts and not row.get("by_contexts"):
            config, phase1 = self.config, self.checkpointer.results["phase1"]
            pretrained = load_embedding(config.embeddings, self.data.vocab_size, config.embed_dim)
            model = untrained_model(config, self.runtime, self.data, pretrained)
            row |= self.look_up_by_contexts(model)
            if self.checkpointer.load_phase1(model):
                phase1 |= self.look_up_by_contexts(model)
            else:
                self.log.warn("warning: Phase 1's weights are gone: no retrieval by its contexts")

    def mend_retrieval(self):
        """Of a complete run: make anew what it looks up, if the file is gone, damaged or unfit."""
        config, fault = self.config, ""
        if not (config.looks_up and config.save_checkpoint):
            return
        if self.checkpointer.writes:
            fault = self.checkpointer.retrieval_fault()
        if fault := self.runtime.group.decided(fault):
            self.log.say(f"retrieval: {fault}; it is made anew")
            self.checkpointer.restore("complete", self.model)
            self.keep(self.look_up(self.model)[0])

    def keep(self, found):
        """Write what was found beside the weights; a disk that refuses costs that file alone."""
        if self.checkpointer.writes:
            with spared(self.log):
                self.checkpointer.keep_retrieval(found, self.model)

    @timed("retrieval")
    def look_up(self, model, parts=False):
        """(Retrieval, its figures) of a trained model; the main process makes it, and has it, for all."""
        settings, group = self.config.part(RetrievalSettings), self.runtime.group
        made = group.by_main(lambda: retrieval_of(model, self.data, settings, self.runtime, parts))
        found, figures = made or (None, None)
        return found, group.decided(figures)

    @timed("retrieval")
    def look_up_by_contexts(self, model):
        """{"by_contexts": what contexts are worth as keys, without a network's prediction, or None}."""
        if not self.compares_contexts:
            return {"by_contexts": None}
        settings, group = self.config.part(RetrievalSettings), self.runtime.group
        self.log.say("looking up by contexts alone")
        figures = group.by_main(lambda: by_contexts(model, self.data, settings, self.runtime))
        return {"by_contexts": group.decided(figures)}

    @timed("samples")
    def write_samples(self, found):
        """{"samples": how the model goes on with a few held-out dialogues}; found: its retrieval, or None."""
        config, group, written = self.config, self.runtime.group, []
        if not config.whiten_context:  # such contexts are those of no new text
            self.log.say("writing on from held-out dialogues")
            written = group.by_main(lambda: samples(self.model, self.data, config.seed, found))
        return {"samples": group.decided(written)}

    def train_head(self, model, stage, freeze_context):
        settings, folder = self.config.part(Phase2Settings), self.checkpointer.folder
        phase = Phase2(model, self.data, settings, self.runtime, folder, stage, freeze_context)
        if stage == "phase2":  # the control is what can be had of the text alone
            phase.teachers = open_teachers(self.config, self.data.fingerprint, self.runtime.device)
        return self.train(phase)

    def train(self, phase):
        with timed(TITLES[phase.stage]):
            return EpochLoop(phase, phase.settings, self.runtime, self.log, self.checkpointer).run()

    @timed("contexts")
    def measure_contexts(self):
        self.log.say("measuring contexts: rank, convergence, memory")
        settings = self.config.part(Phase1Settings)
        free_memory()  # before and behind: its probes hold more than training does at small sizes
        measured = evaluate_contexts(self.model, self.data, settings, self.runtime.device, Progress)
        free_memory()
        return measured

    def complete(self, results):
        """Make the results of a stage part of the checkpoint, and give back what training it took."""
        if results:  # a baseline has no Phase 1
            results["peak_memory_mb"] = peak_memory_mb()
        anew = {"phase1": lambda: self.look_up_by_contexts(self.model)}
        self.checkpointer.complete(self.model, results, anew)
        self.model.zero_grad()
        self.runtime.accelerator.free_memory()  # of the optimizers it has prepared
        free_memory()


def flags(parser):
    help_text = "say what is in effect, memory, disk and checkpoint, and end before the first step"
    parser.add_argument("--dry_run", action="store_true", help=help_text)


if __name__ == "__main__":
    with exit_on_user_error():
        settings, arguments = parse_args(ResidualConfig, description=__doc__.splitlines()[0], extra=flags)
        main(settings, arguments.dry_run)
