"""The run's state on disk: `model_latest.pt`, what may be continued from it, and what may not.

A run is a chain of stages (STAGES). The file holds the weights of the stage in hand, that stage's own state (optimizer,
epoch, batch, contexts) and the results of the stages behind it, so that any save is a point to continue from exactly:
all else (data order, dropout, learning rate) is a function of seed, stage and step.
"""

import platform
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from newllm import __version__
from newllm.errors import UserError
from newllm.interrupt import Stopped, stop_reason
from newllm.storage import Corrupt, load_sealed, save_sealed, usable_folder
from newllm.training.checkpoint_files import CheckpointFiles
from newllm.training.lock import FolderLock, LockLost
from newllm.training.mirror import Mirror

FORMAT = 1
STAGES = ("untrained", "phase1", "phase2", "complete")

BUDGET = {"num_samples", "num_tokens"}
IDENTITY = {
    "preset", "data_source", "tokenizer", "vocab_size", "max_seq_length", "val_samples", "context_dim", "embed_dim",
    "num_layers", "token_layers", "tie_weights", "embeddings", "init_scale", "seed", "freeze_context",
}  # fmt: skip
HARMLESS = {"cache_dir", "checkpoint_dir", "save_checkpoint", "load_checkpoint", "keep_last", "save_every_n_batches",
            "save_every_minutes", "max_minutes", "backup_dir", "backup_every_minutes", "phase", "device",
            "precision", "compile"}  # fmt: skip


class Checkpointer:
    """Saves and restores one run in `checkpoint_dir`, which nobody else may write meanwhile. A context manager.

    Attributes:
        stage: the first stage that is not complete.
        results: metrics of the complete stages, by stage.
        history: {"phase1_history": {...}, "phase2_history": {...}}, lists by name.
        notes: lines about what was found, for the caller to print.
        unsaved: why the last save failed, None when it did not.
        saved_at: time of this session's last save, seconds since the epoch, or None.

    Raises:
        UserError: the folder or what lies in it cannot be used.
    """

    def __init__(self, config, fingerprint, run_id, say=print):
        self.config, self.fingerprint, self.run_id, self.say = config, fingerprint, run_id, say
        self.folder = usable_folder(config.checkpoint_dir, "checkpoint_dir")
        self.files = CheckpointFiles(self.folder, config.keep_last)
        self.stage, self.results = STAGES[0], {}
        self.history = {"phase1_history": {}, "phase2_history": {}}
        self.notes, self.unsaved = [], None
        self._weights = self._stage_state = None
        self._save_number = 0
        self._last_save = self._started = time.monotonic()
        self.saved_at = None
        self._earlier_seconds = self._saving_seconds = 0.0
        self.lock = self.mirror = None
        try:
            if config.save_checkpoint:
                self.lock = FolderLock(self.folder, run_id).acquire()
                self.notes += [self.lock.note] if self.lock.note else []
            if config.save_checkpoint and config.backup_dir:
                self.mirror = Mirror(self.folder, config.backup_dir, min_seconds=60 * config.backup_every_minutes)
                if config.load_checkpoint:
                    self.files.recover(self.mirror.target, self.notes)
            if found := self.files.read_newest(self.notes):
                self._continue(found)
        except BaseException:
            self._let_go()
            raise

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self._let_go(flush=not (kind and issubclass(kind, LockLost)))

    def _let_go(self, flush=True):
        try:
            if self.mirror:
                self.mirror.close(
                    flush
                )  # a run that lost its folder must not overwrite the other's second copies either
                self.say(self.mirror.report())
        finally:
            if self.lock:
                self.lock.release()

    @property
    def seconds(self):
        """Wall time of the run so far, over all its sessions, without what lay between them."""
        return self._earlier_seconds + time.monotonic() - self._started

    @property
    def saving_share(self):
        """Share of this session's time that went into saving."""
        return self._saving_seconds / max(time.monotonic() - self._started, 1e-9)

    @property
    def minutes_since_save(self):
        return (time.monotonic() - self._last_save) / 60

    def best(self, stage):
        """Path of the weights with the lowest validation loss of a stage."""
        return self.folder / ("model_best.pt" if stage == "phase2" else f"model_{stage}_best.pt")

    def is_done(self, stage):
        return STAGES.index(stage) < STAGES.index(self.stage)

    def restore(self, stage, model):
        """Load the saved weights into the model if they belong to this stage.

        Returns:
            The stage's saved state (a dict), or None when the stage starts now.
        """
        if self._weights is None or stage != self.stage:
            return None
        model.load_state_dict(self._weights)
        state, self._weights, self._stage_state = self._stage_state, None, None
        return state

    def due(self, batch):
        """Whether to save after this many batches of the stage: by count, by time, or because the run is to stop."""
        return (
            batch % self.config.save_every_n_batches == 0
            or self.minutes_since_save >= self.config.save_every_minutes > 0
            or stop_reason() is not None
        )

    def save(self, label, model, stage_state):
        """Write the state, and stop here if the run is to stop. A failing disk does not stop training.

        Args:
            label: becomes the file's `epoch`, e.g. "phase1_iteration_3" or "phase2_complete".

        Raises:
            Stopped: after the save, when a signal or the time limit asks for it.
            LockLost: another run took the folder; nothing was written.
        """
        if self.config.save_checkpoint:
            self._save_number += 1
            saved = self._write(lambda: self.files.write(self._content(label, model, stage_state)))
            if self.mirror and saved:
                steps = [path.name for path in self.files.steps()]
                best = [self.best(stage).name for stage in ("untrained", "phase2") if self.best(stage).exists()]
                self.mirror.request([*best, "model_latest.pt", *steps, "manifest.json"], steps, self._save_number)
        if reason := stop_reason():
            raise Stopped(reason)

    def save_best(self, stage, model, metrics):
        """Write the stage's weights of the lowest validation loss so far. Returns the path, None when nothing was saved."""
        if not self.config.save_checkpoint:
            return None
        content = self._content(f"{stage}_best", model, None) | {"best": metrics}
        return self.best(stage) if self._write(lambda: save_sealed(content, self.best(stage))) else None

    def load_best(self, stage):
        """The weights that `save_best` wrote in an earlier session, as a state dict.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            return load_sealed(self.best(stage))["model_state_dict"]
        except (Corrupt, FileNotFoundError) as error:
            raise UserError(
                f"the best weights of this run cannot be read ({error}): put {self.best(stage).name} back, or start afresh "
                "with --no-load_checkpoint."
            ) from error

    def complete(self, stage, model, results):
        """Record the results of a stage and make the next one current."""
        self.results[stage] = results
        self.stage = STAGES[STAGES.index(stage) + 1]
        self.save(f"{stage}_complete", model, None)

    def _write(self, write):
        started = time.monotonic()
        try:
            self.lock.check()
            write()
        except OSError as error:
            self.unsaved = error.strerror or str(error)
            self.say(
                f"warning: checkpoint not saved ({self.unsaved}); training goes on, the files from before are whole"
            )
            return False
        finally:
            self._saving_seconds += time.monotonic() - started
        self.unsaved, self.saved_at, self._last_save = None, time.time(), time.monotonic()
        return True

    def _content(self, label, model, stage_state):
        return {
            "format": FORMAT,
            "epoch": label,
            "stage": self.stage,
            "model_state_dict": {k.replace("_orig_mod.", ""): v for k, v in model.state_dict().items()},
            "stage_state": stage_state,
            "results": self.results,
            **self.history,
            "config": self.config.to_dict(),
            "data_fingerprint": self.fingerprint,
            "run_id": self.run_id,
            "save_number": self._save_number,
            "seconds": self.seconds,
            "saved_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": {"newllm": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
            "git_commit": git_commit(),
        }

    def _continue(self, found):
        """Take over the state of a file if it is of this very run; else refuse, or begin another run beside it."""
        latest = self.files.latest
        if found.get("format") != FORMAT:
            raise UserError(f"{latest} has format {found.get('format')}, this version reads {FORMAT}: move it away.")
        changed = {
            name: (found["config"].get(name), value)
            for name, value in self.config.to_dict().items()
            if found["config"].get(name) != value and name not in HARMLESS
        }
        if not self.config.load_checkpoint:
            return self._archive(found, "load_checkpoint is off")
        if refused := {name: change for name, change in changed.items() if name in IDENTITY}:
            raise UserError(
                f"{latest} is of another run ({_differences(refused)}): choose another --checkpoint_dir, restore these "
                "settings, or start afresh with --no-load_checkpoint."
            )
        if budget := {name: change for name, change in changed.items() if name in BUDGET}:
            return self._archive(found, f"another token budget starts its own run ({_differences(budget)})")
        if found["data_fingerprint"] != self.fingerprint:
            raise UserError(
                f"{latest} was trained on other data than the settings give now (the source or its text changed): choose "
                "another --checkpoint_dir, restore the data, or start afresh with --no-load_checkpoint."
            )
        if changed:
            self.notes.append(f"warning: settings changed since the checkpoint was written: {_differences(changed)}")
        self.run_id, self.stage, self.results = found["run_id"], found["stage"], found["results"]
        if self.lock:
            self.lock.run_id = self.run_id
        self._earlier_seconds, self._save_number = found["seconds"], found["save_number"]
        self.history = {name: found[name] for name in self.history}
        self._weights, self._stage_state = found["model_state_dict"], found["stage_state"]
        self.notes.append(f"continuing run {self.run_id} at {found['epoch']}, saved {found['saved_at']}")

    def _archive(self, found, reason):
        """Keep the files of another run under its own name before this one takes theirs."""
        if self.config.save_checkpoint:
            best = [self.best(stage).name for stage in ("untrained", "phase2")]
            kept = self.files.archive(found["run_id"], best)
            self.notes.append(f"{reason}; the earlier run's files are kept as {', '.join(kept)}")


def _differences(changed):
    return ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())


def git_commit():
    """Commit of the code that runs, or None outside a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
