"""The run's state on disk: `model_latest.pt`, saved while training goes on, and continued from exactly.

A run is a chain of stages (STAGES). The file holds the trained weights of the stage in hand, that stage's own state
(optimizer, epoch, batch, contexts) and the results of the stages behind it, so that any save is a point to continue from
exactly: all else (data order, dropout, learning rate) is a function of seed, stage and step.

A save copies the state and leaves hashing, writing, syncing and reading back to one background thread, so a slow folder
costs training no time. There is at most one save under way: the next one waits for it.
"""

import time
from datetime import UTC, datetime

from newllm.clock import Clock, timed
from newllm.errors import UserError
from newllm.saving.backup import Mirror
from newllm.saving.checkpoint_files import CheckpointFiles
from newllm.saving.compatibility import FORMAT, compare
from newllm.saving.files import Corrupt, load_sealed, save_sealed, usable_folder
from newllm.saving.frozen import frozen_path, store_frozen
from newllm.saving.guard import FolderLock, LockLost
from newllm.saving.save_thread import SaveThread
from newllm.saving.state import place, provenance, snapshot
from newllm.saving.stop import Stopped, agree, save_requested, stop_reason
from newllm.saving.trained import load_weights
from newllm.training.contexts import FILES

STAGES = ("untrained", "phase1", "phase2", "complete")
WITH_BEST = ("untrained", "phase2")  # stages that validate, and so have best weights


class Checkpointer:
    """Saves and restores one run in `checkpoint_dir`, which nobody else may write meanwhile. A context manager.

    Of several processes that train together only the main one touches the folder; the others get from it what it found.

    Attributes:
        stage: the first stage that is not complete.
        results: metrics of the complete stages, by stage.
        history: {"phase1_history": {...}, "phase2_history": {...}}, lists by name.
        notes: lines about what was found, for the caller to print.
        saved_at: time of the last save, also of an earlier session, seconds since the epoch, or None.
        record: lines of the run's record so far, which every state carries: it outlives the machine that they lie on.

    Raises:
        UserError: the folder or what lies in it cannot be used.
    """

    @timed("loading")
    def __init__(self, config, fingerprint, run_id, group, say=print):
        self.config, self.fingerprint, self.group, self.say = config, fingerprint, group, say
        self.run_id, self.writes = group.decided(run_id), config.save_checkpoint and group.is_main
        self.folder = usable_folder(config.checkpoint_dir, "checkpoint_dir")
        self.files = CheckpointFiles(self.folder, config.keep_last)
        self.stage, self.results = STAGES[0], {}
        self.history = {"phase1_history": {}, "phase2_history": {}}
        self.notes, self.record, self.saved_at = [], [], None
        self._step = self._stage_begun = 0  # steps of all stages so far, and of those behind the one in hand
        self._found = self._best_written = None
        self._frozen = None, ""  # (model, digest of what it keeps)
        self._save_number, self._archived = 0, []
        self._last_save = self._started = time.monotonic()
        self._clock, self._provenance = Clock.current or Clock(), provenance()
        self._earlier_saves = {"saves": 0, "save_seconds": 0.0, "longest_save": 0.0}
        self.lock = self.mirror = None
        self.thread = SaveThread(lambda: self.lock.check(), say)
        try:
            if self.writes:
                self.lock = FolderLock(self.folder, run_id).acquire()
                self.notes += [self.lock.note] if self.lock.note else []
                self.files.remove_strays()
            if self.writes and config.backup_dir:
                self.mirror = Mirror(
                    self.folder, config.backup_dir, run_id, min_seconds=60 * config.backup_every_minutes
                )
                self.notes += [self.mirror.lock.note] if self.mirror.lock.note else []
                self.files.recover(self.mirror.target, self.notes)
            if found := group.decided(self.files.read_newest(self.notes) if group.is_main else None):
                self._continue(found)
        except BaseException:
            self._let_go()
            raise

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        lost = kind is not None and issubclass(kind, LockLost)
        try:
            self.thread.wait()
        except LockLost:
            lost = True
            raise
        finally:
            self._let_go(flush=not lost)

    def _let_go(self, flush=True):
        self.thread.close()
        try:
            if self.mirror:
                # A run that lost its folder must not overwrite the other's second copies either.
                self.mirror.close(flush)
                self.say(self.mirror.report())
        finally:
            if self.lock:
                self.lock.release()

    @property
    def seconds(self):
        """Wall time of the run so far, over all its sessions, without what lay between them."""
        return self._clock.seconds

    @property
    def times(self):
        """Over all sessions: seconds of each part of the run, number of saves, their seconds in the thread, the longest."""
        earlier, thread = self._earlier_saves, self.thread
        return {
            "parts": self._clock.parts,
            "saves": earlier["saves"] + thread.saves,
            "save_seconds": earlier["save_seconds"] + thread.written,
            "longest_save": max(earlier["longest_save"], thread.longest),
        }

    @property
    def owns(self):
        """Whether this process is the one that may write in the folder."""
        return self.lock is not None and not self.lock.lost

    @property
    def saving_share(self):
        """(share of this session's time that training waited for saves, share in which one was being written)."""
        session = max(time.monotonic() - self._started, 1e-9)
        return self.thread.waited / session, self.thread.written / session

    @property
    def unsaved(self):
        """Why the last save failed; None when it did not."""
        self.wait()
        return self.thread.failure

    def best(self, stage):
        """Path of the weights with the lowest validation loss of a stage."""
        return self.folder / ("model_best.pt" if stage == "phase2" else f"model_{stage}_best.pt")

    def is_done(self, stage):
        return STAGES.index(stage) < STAGES.index(self.stage)

    @timed("loading")
    def restore(self, stage, model):
        """Load the saved weights into the model if they belong to this stage.

        Returns:
            The stage's saved state (a dict), or None when the stage starts now.

        Raises:
            UserError: tensors that the checkpoint refers to are not there.
        """
        if self._found is None or stage != self._found["stage"]:
            return None
        found, self._found = self._found, None
        load_weights(self.files, model, found)
        return found["stage_state"]

    def arrived(self, stage, position, steps):
        """Take note of where training is.

        Args:
            position: of newllm.training.loop. steps: of the stage.

        Returns:
            What the status says of it: the position, the step of the run, the time of the last save.
        """
        self._step = self._stage_begun + steps
        here = {"stage": stage, "step": self._step, "saved_at": self.saved_at}
        return here | position | {"epoch": position["epoch"] + 1}

    def due(self, steps):
        """Whether to save after this many steps of the stage: by those of the run, by time, or because somebody asks for it."""
        agree(self.group.first_reason)
        config, since = self.config, time.monotonic() - self._last_save
        return stop_reason() is not None or self.group.decided(
            (
                (self._stage_begun + steps) % config.save_every_n_batches == 0
                and since >= config.save_min_seconds
            )
            or since / 60 >= config.save_every_minutes > 0
            or save_requested()
        )

    @timed("saving")
    def save(
        self, label, model, stage_state, best=None, names=(), optional=False, before=None, position=None
    ):
        """Save the state in the background; stop here if the run is to stop. A failing disk does not stop training.

        Args:
            label: becomes the file's `epoch`, e.g. "phase1_iteration_3" or "phase2_complete".
            best: {"weights", "metrics"} of the stage's lowest validation loss; written first, if not written yet.
            names: further names to keep it by, of checkpoint_files.KEPT.
            optional: leave it out while the save before is still being written; the next one holds the same and more.
            before: called before anything is written, in the thread that writes.
            position: of newllm.training.loop, of a stage that has begun.

        Raises:
            Stopped: when a signal or the time limit asks for it, and the state is on disk.
            LockLost: another run took the folder; nothing was written.
            UserError: the run is to stop and its state could not be written.
        """
        reason = stop_reason()
        if self.writes and (reason or not (optional and self.thread.busy)):
            names = [*names, *["model_backup.pt"] * save_requested(answered=True)]
            self.thread.start(
                lambda: snapshot(self._content(label, model, stage_state, position)),
                lambda content: (before and before(), self._write(content, model, best, names)),
            )
            self._last_save = time.monotonic()
        if reason:
            if self.unsaved:
                raise UserError(
                    f"{reason}, but the state could not be written ({self.unsaved}); the save before it is whole."
                )
            raise Stopped(reason)

    @timed("loading")
    def load_best(self, stage):
        """What an earlier session saved as best: {"weights", "metrics"}.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            found = self.group.decided(load_sealed(self.best(stage)) if self.group.is_main else None)
        except (Corrupt, FileNotFoundError) as error:
            raise UserError(
                f"the best weights of this run cannot be read ({error}): put {self.best(stage).name} back, or start afresh "
                "with --no-load_checkpoint."
            ) from error
        self._best_written = stage, found["best"]
        return {"weights": found["model_state_dict"], "metrics": found["best"]}

    def complete(self, stage, model, results):
        """Record the results of a stage and make the next one current."""
        self.results[stage] = results
        self.stage, self._stage_begun = STAGES[STAGES.index(stage) + 1], self._step
        self.save(f"{stage}_complete", model, None, names=["model_phase1.pt"] * (stage == "phase1"))
        if self.writes and (files := list(self.folder.glob(FILES))):
            self.wait()
            for path in files:
                path.unlink()

    @timed("saving")
    def wait(self):
        """Until what is being saved is on the disk, or has been refused by it."""
        self.thread.wait()

    def _write(self, content, model, best, names):
        """In the thread: frozen tensors once, best weights, the state with its further names, and then word to the mirror."""
        if self._frozen[0] is not model:  # the control keeps other tensors than the run's own
            self._frozen = model, store_frozen(self.folder, model)
        content["frozen"] = self._frozen[1]
        stage = content["stage"]
        if best and (stage, best["metrics"]) != self._best_written:
            save_sealed(
                content | {"stage_state": None, "model_state_dict": best["weights"], "best": best["metrics"]},
                self.best(stage),
            )
            self._best_written = stage, best["metrics"]
            if stage == "phase2":
                self.say(f"Saved best model (val loss {best['metrics']['loss']:.4f}) to {self.best(stage)}")
        self.files.write(content, names)
        self.saved_at = datetime.fromisoformat(content["saved_at"]).timestamp()
        if self.mirror:
            bests = [self.best(stage).name for stage in WITH_BEST]
            others = [
                frozen_path(self.folder, content["frozen"]).name,
                *self._archived,
                *bests,
                "model_phase1.pt",
            ]
            self.mirror.request([*others, "model_latest.pt", "manifest.json"], content["save_number"])

    def _content(self, label, model, stage_state, position):
        self._save_number += 1
        where = {"stage": self.stage, "position": position, "step": self._step}
        return where | {
            "format": FORMAT,
            "epoch": label,
            "restart": place(where),
            "model_state_dict": {k.replace("_orig_mod.", ""): v for k, v in model.trained_state().items()},
            "stage_state": stage_state,
            "stage_begun": self._stage_begun,
            "record": self.record,
            "results": self.results,
            **self.history,
            "config": self.config.to_dict(),
            "data_fingerprint": self.fingerprint,
            "run_id": self.run_id,
            "save_number": self._save_number,
            "seconds": self.seconds,
            "times": self.times,
            "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
            **self._provenance,
        }

    def _continue(self, found):
        """Take over the state of a file if it is of this very run; else refuse, or begin another run beside it."""
        latest = self.files.latest
        verdict, reason = compare(found, self.config, self.fingerprint)
        if verdict == "refuse":
            raise UserError(f"{latest} {reason}")
        if verdict == "begin":
            if self.writes:
                self._archived = self.files.archive(
                    found["run_id"], [self.best(stage).name for stage in WITH_BEST]
                )
                self.notes.append(
                    f"{reason}; the earlier run's files are kept as {', '.join(self._archived)}"
                )
            return
        self.notes += [reason] if reason else []
        self.run_id, self.stage, self.results = found["run_id"], found["stage"], found["results"]
        for holder in (self.lock, self.mirror and self.mirror.lock):
            if holder:
                holder.run_id = self.run_id
        self._save_number, self.saved_at = (
            found["save_number"],
            datetime.fromisoformat(found["saved_at"]).timestamp(),
        )
        times = found.get(
            "times", {"parts": {"not told apart": found["seconds"]}}
        )  # earlier versions knew the sum alone
        self._clock.add(times["parts"])
        self._earlier_saves = {name: times.get(name, none) for name, none in self._earlier_saves.items()}
        self.history = {name: found[name] for name in self.history}
        self._step, self._stage_begun, self.record = found["step"], found["stage_begun"], found["record"]
        self._found = found
        self.notes.append(
            f"continuing run {self.run_id} {found['restart']} (save {self._save_number}, {found['saved_at']})"
        )
