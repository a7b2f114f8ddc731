"""The run's state on disk: `model_latest.pt`, saved while training goes on, and continued from exactly.

A run is a chain of stages (STAGES). A state holds the trained weights of the stage in hand, that stage's own
state (optimizer, place, contexts) and the results of the stages behind it. All else (data order, dropout,
learning rate) is a function of seed, stage and step, so any save is a point to continue from exactly.

A save copies the state and leaves hashing, writing, syncing and reading back to one background thread, so a
slow folder costs training no time; the next save waits for it. The new state takes its name when it has been
read back.
"""

import copy
import dataclasses
import platform
import shutil
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

from newllm import __version__
from newllm.clock import Clock, timed
from newllm.errors import UserError
from newllm.retrieval.mixture import FORMAT as RETRIEVAL_FORMAT
from newllm.saving import runs, trained
from newllm.saving.backup import Backup, SaveThread
from newllm.saving.files import Corrupt, duplicate, load_sealed, save_sealed, usable_folder
from newllm.saving.guard import Guard
from newllm.saving.stop import Stopped, agree, save_requested, stop_reason
from newllm.training.contexts import FILES, in_files

STAGES = ("untrained", "phase1", "phase2", "retrieval", "complete")
STAGE_NAMES = dict(untrained="the untrained row", phase1="Phase 1", phase2="Phase 2", retrieval="retrieval")
BEST = {"untrained": runs.CONTROL, "phase2": "model_best.pt"}  # lowest validation loss
PHASE1 = "model_phase1.pt"  # what Phase 1 has made
BEGINNING = dict(  # attributes of a Checkpointer that every state carries
    stage=STAGES[0], results={}, phase1_history={}, phase2_history={}, record=[],
    step=0, stage_begun=0, save_number=0,
)  # fmt: skip
ATTEMPTS, WAIT = 3, 0.5  # tries of a write, seconds before the second: a network folder may fail for a moment
RETRIEVALS_ON_DISK = 2  # beside the weights, and within the model file
STATES_ON_DISK = 5  # latest, previous, end of an epoch, end of Phase 1, and the one being written


class Checkpointer:
    """Saves and restores one run in `checkpoint_dir`, which nobody else writes meanwhile. A context manager.

    Of several processes that train together only the main one touches the folder.

    Attributes:
        stage: the first stage that is not complete. results: metrics of the complete stages, by stage.
        phase1_history, phase2_history: {name: values of all epochs}.
        record: lines of the run's record so far; as every state carries them, they outlive the machine.
        step: optimizer steps of all stages so far. stage_begun: those of the complete stages.
        reused: {part of the untrained row: its results} that another run of the folder has.
        notes: lines about what was found, for the caller to print.
        saved_at: time of the last save, also of an earlier session, seconds since the epoch, or None.

    Raises:
        UserError: the folder or what lies in it cannot be used.
    """

    @timed("loading")
    def __init__(self, config, fingerprint, run_id, group):
        self.config = config
        self.fingerprint = fingerprint
        self.group = group
        self.writes = config.save_checkpoint and group.is_main
        self.top = self.folder = usable_folder(config.checkpoint_dir, "checkpoint_dir", self.writes)
        self.notes = []
        self.saved_at = None
        self._last_save = time.monotonic()
        self._best_written = None
        self._frozen = None, ""  # (model, digest of what it keeps)
        self._clock = Clock.current
        self._provenance = provenance()
        self.lock = self.mirror = None
        self.thread = SaveThread(lambda: self.lock.check(), print)
        try:
            if self.writes:
                self._take_folder()
            opened = group.decided(self._open(run_id) if group.is_main else None)
            self.run_id, self.folder, self._found, self.reused, self._taken, rows = opened
            vars(self).update(copy.deepcopy(BEGINNING))
            if self._found:
                self._continue(self._found)
            self.record += [row for row in rows if row not in self.record]
        except BaseException:
            self.close()
            raise

    def _take_folder(self):
        self.lock = Guard(self.folder)
        for stray in [*self.folder.glob(".*.tmp"), *self.folder.glob(f"{runs.RUNS}/*/.*.tmp")]:
            stray.unlink(missing_ok=True)  # of processes that were killed
        if self.config.backup_dir:
            every = 60 * self.config.backup_every_minutes
            self.mirror = Backup(self.folder, self.config.backup_dir, self.lock, every, print)
            runs.fetch(self.folder, self.mirror.target, self.notes)

    def _open(self, new_id):
        """Find the run that the settings say and bring it to the top, or make way for a new one.

        Returns:
            (its id, its folder, its state or None), and what `choose` takes of other runs.
        """
        top = runs.mended(self.folder, self.notes) if self.writes else runs.newest_state(self.folder)
        choice = runs.choose(self.folder, top, self.config, self.fingerprint)
        self.notes += choice.lines
        home = choice.home
        if self.writes and home != self.folder:
            runs.change(self.folder, top, home, self.notes)
            home = home and self.folder
        found = runs.newest_state(home, mmap=False) if home else None
        run_id = found["run_id"] if found else runs.unused_id(self.folder, new_id)
        return run_id, home or self.folder, found, choice.reused, choice.stages, choice.record

    def _continue(self, state):
        """Take over a state, which is of this very run."""
        vars(self).update({name: state[name] for name in BEGINNING})
        self.saved_at = datetime.fromisoformat(state["saved_at"]).timestamp()
        self._clock.add(state["times"]["parts"])
        self.thread.saves = state["times"]["saves"]
        self.thread.written = state["times"]["save_seconds"]
        self.thread.longest = state["times"]["longest_save"]
        if changes := runs.changed(state["config"], self.config.to_dict()):
            done = "warning: settings changed since the checkpoint was written, what is done stays as it is: "
            self.notes.append(done + runs.listed(changes))
        save = f"save {self.save_number}, {state['saved_at']}"
        self.notes.append(f"continuing run {self.run_id} {state['restart']} ({save})")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.thread.wait()
        finally:
            self.close()

    def close(self):
        self.thread.close()
        try:
            if self.mirror:
                # A run that lost its folder must not overwrite the other's second copies either.
                self.mirror.close(flush=self.owns)
                print(self.mirror.report())
        finally:
            if self.lock:
                self.lock.release()

    @property
    def seconds(self):
        """Wall time of the run so far, over all its sessions, without what lay between them."""
        return self._clock.seconds

    @property
    def times(self):
        """Over all sessions: seconds of each part, number of saves, seconds in the thread, the longest."""
        thread = self.thread
        saves = {"saves": thread.saves, "save_seconds": thread.written, "longest_save": thread.longest}
        return {"parts": self._clock.parts, **saves}

    @property
    def owns(self):
        """Whether this process is the one that may write in the folder."""
        return self.lock is not None and not self.lock.lost

    @property
    def unsaved(self):
        """Why the last save failed; None when it did not."""
        self.wait()
        return self.thread.failure

    def is_done(self, stage):
        return STAGES.index(stage) < STAGES.index(self.stage)

    @timed("loading")
    def restore(self, stage, model):
        """Load the saved weights into the model if they belong to this stage.

        Returns:
            The stage's saved state (a dict), or None when the stage starts now.
        """
        if self._found is None or stage != self._found["stage"]:
            return None
        found, self._found = self._found, None
        trained.load_weights(self.folder, model, found)
        return found["stage_state"]

    @timed("loading")
    def load_best(self, stage):
        """What an earlier session saved as best: {"weights", "metrics"}.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = self.folder / BEST[stage]
        try:
            found = self.group.decided(load_sealed(path) if self.group.is_main else None)
        except (Corrupt, FileNotFoundError) as error:
            raise UserError(
                f"the best weights of this run cannot be read ({error}): put {path.name} back, or start "
                "afresh with --no-load_checkpoint."
            ) from error
        self._best_written = {"weights": found["model_state_dict"], "metrics": found["best"]}
        return self._best_written

    @timed("loading")
    def load_control(self, model):
        """Give a copy of the network the weights of the untrained control that a run of this folder has.

        Returns:
            Whether there are any; if not, the model may be of no further use.
        """
        return self._gave(model, lambda: runs.control_of(self.top, self.config, self.fingerprint))

    @timed("loading")
    def load_phase1(self, model):
        """Give a copy of the network what Phase 1 made of it; returns as `load_control`."""
        return self._gave(model, lambda: (self.folder, load_sealed(self.folder / PHASE1)))

    def _gave(self, model, find):
        self.wait()
        known = True
        try:
            folder, state = find()
            trained.load_weights(folder, model, state)
        except (OSError, UserError):  # or its frozen tensors are gone
            known = False
        return self.group.decided(known)

    @timed("loading")
    def retrieval_fault(self):
        """What is wrong with the file of what a complete run looks up, in words; "" if it is as it was."""
        try:
            trained.read_retrieval(self.folder, self.results["retrieval"]["model"])
        except UserError as error:
            return str(error)
        return ""

    @timed("saving")
    def keep_retrieval(self, retrieval, model):
        """Write what the model looks up beside its weights, and into the second copies.

        Raises:
            OSError: it cannot be written. LockLost: another run took the folder.
        """
        self.wait()
        self.lock.check()
        content = trained.retrieval_content(retrieval, model) | {"run_id": self.run_id}
        save_sealed(content, self.folder / trained.RETRIEVAL)
        if self.mirror:
            self.mirror.request([trained.RETRIEVAL], self.save_number)

    def arrived(self, stage, position, steps):
        """Note where training is, after so many steps of a stage; returns what the status says of it."""
        self.step = self.stage_begun + steps
        here = {"stage": stage, "step": self.step, "saved_at": self.saved_at}
        return here | position | {"epoch": position["epoch"] + 1}

    def due(self, steps):
        """Whether to save after so many steps of the stage: by number, by time, or because somebody asks."""
        agree(self.group.first_reason)
        config, since = self.config, time.monotonic() - self._last_save
        by_steps = (self.stage_begun + steps) % config.save_every_n_batches == 0
        by_time = since / 60 >= config.save_every_minutes > 0
        wanted = (by_steps and since >= config.save_min_seconds) or by_time or save_requested()
        return stop_reason() is not None or self.group.decided(wanted)

    @timed("saving")
    def save(self, label, model, state=None, best=None, names=(), optional=False, before=None, position=None):
        """Save the state in the background; stop here if the run is to stop. A failing disk stops nothing.

        Args:
            label: becomes the file's `epoch`, e.g. "phase1_iteration_3" or "phase2_complete".
            best: {"weights", "metrics"} of the stage's lowest validation loss; written first, once.
            names: further names to keep the state by. position: of a stage that has begun.
            optional: leave it out while the save before is still being written.
            before: called before anything is written, in the thread that writes.

        Raises:
            Stopped: when a signal or the time limit asks for it, and the state is on disk.
            LockLost: another run took the folder; nothing was written.
            UserError: the run is to stop and its state could not be written.
        """
        reason = stop_reason()
        if self.writes and (reason or not (optional and self.thread.busy)):
            if save_requested(answered=True):
                names = [*names, "model_backup.pt"]

            def write(content):
                if before:
                    before()
                self._write(content, model, best, names)

            self.thread.start(lambda: snapshot(self._content(label, model, state, position)), write)
            self._last_save = time.monotonic()
        if not reason:
            return
        if self.unsaved:
            failed = f"the state could not be written ({self.unsaved}); the save before it is whole"
            raise UserError(f"{reason}, but {failed}.")
        raise Stopped(reason)

    @timed("saving")
    def wait(self):
        """Until what is being saved is on the disk, or has been refused by it."""
        self.thread.wait()

    def complete(self, model, results, anew=None):
        """Record a stage's results and make the next one current, past those that another run has.

        Args:
            anew: {stage: function of nothing}: results that are made from the model's weights, also where
                the stage is another run's, as they depend on settings that may differ between the two.
        """
        self._pass(model, results)
        while state := self._taken.pop(self.stage, None):
            trained.load_weights(runs.home_of(self.folder, state["run_id"]), model, state)
            history = f"{self.stage}_history"
            setattr(self, history, state[history])
            results = state["results"][self.stage]
            if anew and self.stage in anew:
                results |= anew[self.stage]()
            self._pass(model, results)
        if self.writes and (of_contexts := list(self.folder.glob(FILES))):
            self.wait()
            for path in of_contexts:
                path.unlink()

    def _pass(self, model, results):
        done = self.stage
        self.results[done] = results
        self.stage = STAGES[STAGES.index(self.stage) + 1]
        self.stage_begun = self.step
        label = "phase2" if done == "retrieval" else done  # it changes no weights
        names = [PHASE1] if done == "phase1" else []
        self.save(f"{label}_complete", model, names=names)

    def _write(self, content, model, best, names):
        """In the thread: frozen tensors once, best weights, the state by all its names; then the mirror."""
        if self._frozen[0] is not model:  # the control keeps other tensors than the run's own
            self._frozen = model, trained.store_frozen(self.folder, model)
        content["frozen"] = self._frozen[1]
        if best and best is not self._best_written:
            path = self.folder / BEST[content["stage"]]
            kept = {"stage_state": None, "model_state_dict": best["weights"], "best": best["metrics"]}
            save_sealed(content | kept, path)
            self._best_written = best
            if content["stage"] == "phase2":
                print(f"Saved best model (val loss {best['metrics']['loss']:.4f}) to {path}")
        write_state(self.folder, content, self.config.keep_last, names)
        self.saved_at = datetime.fromisoformat(content["saved_at"]).timestamp()
        if self.mirror:
            frozen = trained.frozen_path(self.folder, content["frozen"]).name
            names = [frozen, *BEST.values(), PHASE1, trained.RETRIEVAL, runs.LATEST, runs.MANIFEST]
            beside = sorted(self.folder.glob(f"{runs.RUNS}/*/model_*.pt"))
            names += [path.relative_to(self.folder) for path in beside]
            self.mirror.request(names, content["save_number"])  # which copies none twice

    def _content(self, label, model, stage_state, position):
        self.save_number += 1
        content = {name: getattr(self, name) for name in BEGINNING} | self._provenance | dict(
            format=runs.FORMAT, retrieval_format=RETRIEVAL_FORMAT, run_id=self.run_id,
            config=self.config.to_dict(), data_fingerprint=self.fingerprint,
            epoch=label, position=position, model_state_dict=model.trained_state(), stage_state=stage_state,
            seconds=self.seconds, times=self.times, saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        return content | {"restart": place(content)}


def only_reading(config, fingerprint, group):
    """A Checkpointer of the run that these settings would continue; nothing is written or made."""
    return Checkpointer(dataclasses.replace(config, save_checkpoint=False), fingerprint, "", group)


def write_state(folder, content, keep_last=0, names=()):
    """Make a state the latest of its folder; the latest becomes the previous one. The manifest comes last.

    Args:
        keep_last: how many `model_step_{n}.pt`, after n steps of the run, to keep too. names: further ones.

    Raises:
        OSError: it could not be written in ATTEMPTS tries; the files that were there are untouched.
    """
    latest = folder / runs.LATEST
    begins = content["save_number"] == 1  # what has the name is then a run that is kept elsewhere
    for attempt in range(ATTEMPTS):
        try:
            save_sealed(content, latest, None if begins else folder / runs.PREVIOUS)
            break
        except OSError:
            if attempt + 1 == ATTEMPTS:
                raise
            time.sleep(WAIT * 2**attempt)
    if keep_last:
        names = [*names, f"model_step_{content['step']:08d}.pt"]
    for name in names:
        duplicate(latest, folder / name)
    if keep_last:
        for path in sorted(folder.glob("model_step_*.pt"))[:-keep_last]:
            path.unlink()
    runs.announce(folder, content)


def snapshot(value):
    """The same structure with copies of all tensors, on the CPU: training goes on changing its own."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), value)


def place(content):
    """Where a state goes on: "in Phase 2, epoch 12, batch 14 of 30 (sample 416 of 960), step 344"."""
    stage, at, step = content["stage"], content["position"], f"step {content['step']}"
    if stage == "complete":
        return f"at its end, {step}"
    if not at:
        return f"at the beginning of {STAGE_NAMES[stage]}, {step}"
    where = f"in {STAGE_NAMES[stage]}"
    epoch = "iteration" if stage == "phase1" else "epoch"
    if at["epoch"] >= at["epochs"] and not at["sample"]:
        return f"{where}, after {epoch} {at['epoch']}, {step}"
    where += f", {epoch} {at['epoch'] + 1}"
    if at["sample"] == at["samples"]:
        return f"{where}, its validation, {step}"
    where += f", batch {at['batch'] + 1} of {at['batches']} (sample {at['sample']} of {at['samples']})"
    return f"{where}, {step}"


def require_space(folder, model, config, context_dtype):
    """Refuse to begin what the disk cannot hold: weights with two moments each, contexts, retrieval.

    Raises:
        UserError: the folder has too little room for the checkpoints and files of a run.
    """
    weights = sum(tensor.nbytes for tensor in model.trained_state().values())
    values = config.train_tokens * config.context_dim
    copies = 2 if in_files(values, context_dtype, config.context_memory_mb) else STATES_ON_DISK
    needed = STATES_ON_DISK * 3 * weights + copies * values * context_dtype.itemsize
    if config.looks_up:
        needed += RETRIEVALS_ON_DISK * trained.retrieval_bytes(config, model.vocab_size, config.train_tokens)
    needed -= runs.bytes_of(Path(folder))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB free and the checkpoints of this run need about "
            f"{needed / 1e9:.2f} GB more: make room, choose another --checkpoint_dir, or train with "
            "--no-save_checkpoint."
        )


def provenance():
    """Versions and the commit of the code that runs (None outside a checkout)."""
    versions = {"newllm": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    settings = dict(cwd=Path(__file__).parent, capture_output=True, text=True, encoding="utf-8", timeout=5)
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **settings).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {"versions": versions, "git_commit": commit or None}
