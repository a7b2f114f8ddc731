"""The run's state on disk: `model_latest.pt`, saved while training goes on, and continued from exactly.

A run is a chain of stages (STAGES). The file holds the trained weights of the stage in hand, that stage's
own state (optimizer, epoch, batch, contexts) and the results of the stages behind it, so that any save is a
point to continue from exactly: all else (data order, dropout, learning rate) is a function of seed, stage
and step.

A save copies the state and leaves hashing, writing, syncing and reading back to one background thread, so a
slow folder costs training no time; the next one waits for it. The new state takes its name when it has been
read back. The manifest, written last, is only for people and `scripts.status`: each file proves itself by
its seal.
"""

import json
import os
import platform
import shutil
import subprocess
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import torch

from newllm import __version__
from newllm.clock import Clock, timed
from newllm.errors import UserError
from newllm.saving import files, runs
from newllm.saving.backup import Backup, SaveThread
from newllm.saving.files import Corrupt, copy_verified, duplicate, load_sealed, save_sealed, write_text
from newllm.saving.guard import Guard, LockLost
from newllm.saving.runs import FORMAT, LATEST, MANIFEST, PREVIOUS
from newllm.saving.stop import Stopped, agree, save_requested, stop_reason
from newllm.saving.trained import frozen_digest, frozen_path, load_weights
from newllm.training.contexts import FILES, in_files

STAGES = ("untrained", "phase1", "phase2", "complete")
STAGE_NAMES = {"untrained": "the untrained row", "phase1": "Phase 1", "phase2": "Phase 2"}
ATTEMPTS, WAIT = 3, 0.5  # tries of a write, seconds before the second: a network folder may fail for a moment
WARNING = "warning: settings changed since the checkpoint was written, what is done stays as it is: "
STATES_ON_DISK = 5  # latest, previous, end of an epoch, end of Phase 1, and the one being written


class Checkpointer:
    """Saves and restores one run in `checkpoint_dir`, which nobody else writes meanwhile. A context manager.

    Of several processes that train together only the main one touches the folder; the others get from it
    what it found.

    Attributes:
        stage: the first stage that is not complete.
        results: metrics of the complete stages, by stage.
        history: {"phase1_history": {...}, "phase2_history": {...}}, lists by name.
        reused: parts of the untrained row that another run of the folder has, with the bits they would have
            here.
        notes: lines about what was found, for the caller to print.
        saved_at: time of the last save, also of an earlier session, seconds since the epoch, or None.
        record: lines of the run's record so far, which every state carries: it outlives the machine that
            they lie on.

    Raises:
        UserError: the folder or what lies in it cannot be used.
    """

    @timed("loading")
    def __init__(self, config, fingerprint, run_id, group, say=print):
        self.config, self.fingerprint, self.group, self.say = config, fingerprint, group, say
        self.run_id, self.writes = run_id, config.save_checkpoint and group.is_main
        self.folder = files.usable_folder(config.checkpoint_dir, "checkpoint_dir")
        self.stage, self.results, self.made, self.reused = STAGES[0], {}, {}, {}
        self.history = {"phase1_history": {}, "phase2_history": {}}
        self.notes, self.record, self.saved_at = [], [], None
        self._step = self._stage_begun = 0  # steps of all stages so far, and of those behind the one in hand
        self._found = self._best_written = self._phase1 = None
        self._frozen = None, ""  # (model, digest of what it keeps)
        self._save_number, self._to_copy = 0, []
        self._last_save = self._started = time.monotonic()
        self._clock, self._provenance = Clock.current, provenance()
        self._earlier_saves = {"saves": 0, "save_seconds": 0.0, "longest_save": 0.0}
        self.lock = self.mirror = None
        self.thread = SaveThread(lambda: self.lock.check(), say)
        try:
            if self.writes:
                self._take_folder()
            opened = group.decided(self._open() if group.is_main else None)
            self.run_id, self.folder, found, self.reused, self._phase1, self.record = opened
            if found:
                self._continue(found)
        except BaseException:
            self._let_go()
            raise

    def _take_folder(self):
        self.lock = Guard(self.folder)
        for stray in [*self.folder.glob(".*.tmp"), *self.folder.glob(f"{runs.RUNS}/*/.*.tmp")]:
            stray.unlink(missing_ok=True)  # of processes that were killed
        if self.config.backup_dir:
            every = 60 * self.config.backup_every_minutes
            self.mirror = Backup(self.folder, self.config.backup_dir, self.lock, every, self.say)
            recover(self.folder, self.mirror.target, self.notes)

    def _open(self):
        """Find the run, move it to the top of the folder or make way for a new one.

        Returns:
            (its id, its folder, its state or None, parts taken from other runs, the state with Phase 1 of
            one, record).
        """
        top = mended(self.folder, self.notes) if self.writes else runs.newest(self.folder)[0]
        choice = runs.choose(self.folder, top, self.config, self.fingerprint)
        home, found, record = choice.home, None, []
        self.notes += choice.lines
        reused, phase1, rows = self._parts(choice.taken)
        moves = self.writes and home != self.folder
        if moves:
            self._change(top, home)
            home = self.folder if home else None
        if home:
            place = runs.newest(home)[1]
            found = load_sealed(place)
            record = found["record"]
            if moves:
                announce(home, found, files.verify_seal(place))
        if self.mirror:
            self._to_copy = uncopied(self.folder, self.mirror.target)
        run_id = found["run_id"] if found else runs.unused_id(self.folder, self.run_id)
        record += [row for row in rows if row not in record]
        return run_id, home or self.folder, found, reused, phase1, record

    def _change(self, top, home):
        """Park the run at the top, if there is one, and bring up the one in `home`, if it is one."""
        try:
            if home:
                mended(home, self.notes)
            if top:
                runs.park(self.folder, top["run_id"])
            if home:
                runs.bring_up(self.folder, home.name)
        except OSError as error:
            raise UserError(
                f"the run in {self.folder} cannot be changed ({error.strerror or error}): mend that and "
                "start again; nothing is lost."
            ) from error

    def _parts(self, taken):
        """(parts of the untrained row, the state with Phase 1 or None, rows of the record) of other runs."""
        reused, phase1, record = {}, None, []
        for part, (home, state) in taken.items():
            try:
                if part == "phase1":
                    found = load_sealed(home / "model_phase1.pt")
                    if found["run_id"] != state["run_id"]:
                        raise Corrupt(f"{home / 'model_phase1.pt'} is of another run")
                    phase1 = found
                else:
                    found = runs.newest(home)[0]
                    reused[part] = found["results"]["untrained"][part]
            except (Corrupt, OSError, UserError) as error:
                self.notes.append(f"warning: {error}; {runs.PARTS[part][2]} is made anew")
                continue
            if part in ("phase1", "head"):
                stage = runs.PARTS[part][0]
                record += [line for line in found["record"] if json.loads(line)["stage"] == stage]
        return reused, phase1, record

    def _continue(self, found):
        """Take over the state of a file, which is of this very run."""
        if changes := runs.changed(found["config"], self.config.to_dict()):
            self.notes.append(WARNING + runs.listed(changes))
        self.stage, self.results = found["stage"], found["results"]
        self._save_number = found["save_number"]
        self.saved_at = datetime.fromisoformat(found["saved_at"]).timestamp()
        # Versions before this one knew the sum of the seconds alone.
        times = found.get("times", {"parts": {"not told apart": found["seconds"]}})
        self._clock.add(times["parts"])
        self._earlier_saves = {name: times.get(name, none) for name, none in self._earlier_saves.items()}
        self.history = {name: found[name] for name in self.history}
        self._step, self._stage_begun = found["step"], found["stage_begun"]
        self.made = dict(found.get("made", {}))
        marks = {mark for stage, shaped, _ in runs.PARTS.values() if stage == self.stage for mark in shaped}
        if found["position"] and not runs.same_bits(self.made, self.stage, self.config, marks):
            self.made[self.stage] = {}  # made with several settings: for no other run to take
        self._found = found
        self.notes.append(
            f"continuing run {self.run_id} {found['restart']} (save {self._save_number}, {found['saved_at']})"
        )

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
        """Over all sessions: seconds of each part, number of saves, seconds in the thread, the longest."""
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
        """Shares of this session's time: (training waited for a save, a save was being written)."""
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
        load_weights(self.folder, model, found)
        return found["stage_state"]

    def arrived(self, stage, position, steps):
        """Take note of where training is.

        Args:
            position: of newllm.training.loop.State. steps: of the stage.

        Returns:
            What the status says of it: the position, the step of the run, the time of the last save.
        """
        self._step = self._stage_begun + steps
        here = {"stage": stage, "step": self._step, "saved_at": self.saved_at}
        return here | position | {"epoch": position["epoch"] + 1}

    def due(self, steps):
        """Whether to save after so many steps of the stage: by number, by time, or because somebody asks."""
        agree(self.group.first_reason)
        config, since = self.config, time.monotonic() - self._last_save
        by_steps = (self._stage_begun + steps) % config.save_every_n_batches == 0
        by_time = since / 60 >= config.save_every_minutes > 0
        wanted = (by_steps and since >= config.save_min_seconds) or by_time or save_requested()
        return stop_reason() is not None or self.group.decided(wanted)

    @timed("saving")
    def save(
        self, label, model, stage_state, best=None, names=(), optional=False, before=None, position=None
    ):
        """Save the state in the background; stop here if the run is to stop. A failing disk stops nothing.

        Args:
            label: becomes the file's `epoch`, e.g. "phase1_iteration_3" or "phase2_complete".
            best: {"weights", "metrics"} of the stage's lowest validation loss; written first, if not written
                yet.
            names: further names to keep it by, which `runs.states` knows.
            optional: leave it out while the save before is still being written; the next one holds the same
                and more.
            before: called before anything is written, in the thread that writes.
            position: of newllm.training.loop.State, of a stage that has begun.

        Raises:
            Stopped: when a signal or the time limit asks for it, and the state is on disk.
            LockLost: another run took the folder; nothing was written.
            UserError: the run is to stop and its state could not be written.
        """
        reason = stop_reason()
        if self.writes and (reason or not (optional and self.thread.busy)):
            if position:
                self.made.setdefault(self.stage, runs.bits_of(self.config))
            if save_requested(answered=True):
                names = [*names, "model_backup.pt"]

            def write(content):
                if before:
                    before()
                self._write(content, model, best, names)

            self.thread.start(lambda: snapshot(self._content(label, model, stage_state, position)), write)
            self._last_save = time.monotonic()
        if reason:
            if self.unsaved:
                raise UserError(
                    f"{reason}, but the state could not be written ({self.unsaved}); the save before it is "
                    "whole."
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
                f"the best weights of this run cannot be read ({error}): put {self.best(stage).name} back, "
                "or start afresh with --no-load_checkpoint."
            ) from error
        self._best_written = stage, found["best"]
        return {"weights": found["model_state_dict"], "metrics": found["best"]}

    def complete(self, stage, model, results):
        """Record a stage's results and make the next one current: Phase 2 where another run has Phase 1."""
        self._pass(stage, results)
        if stage == "untrained" and self._phase1:
            load_weights(self.folder, model, self._phase1)
            self.history["phase1_history"] = self._phase1["phase1_history"]
            stage = "phase1"
            self._pass(stage, self._phase1["results"][stage])
            self._phase1 = None
        self.save(f"{stage}_complete", model, None, names=["model_phase1.pt"] if stage == "phase1" else [])
        if self.writes and (of_contexts := list(self.folder.glob(FILES))):
            self.wait()
            for path in of_contexts:
                path.unlink()

    def _pass(self, stage, results):
        self.results[stage] = results
        self.made.setdefault(stage, runs.bits_of(self.config))
        self.stage, self._stage_begun = STAGES[STAGES.index(stage) + 1], self._step

    @timed("saving")
    def wait(self):
        """Until what is being saved is on the disk, or has been refused by it."""
        self.thread.wait()

    def _write(self, content, model, best, names):
        """In the thread: frozen tensors once, best weights, the state by all its names; then the mirror."""
        if self._frozen[0] is not model:  # the control keeps other tensors than the run's own
            self._frozen = model, store_frozen(self.folder, model)
        content["frozen"] = self._frozen[1]
        stage = content["stage"]
        if best and (stage, best["metrics"]) != self._best_written:
            kept = {"stage_state": None, "model_state_dict": best["weights"], "best": best["metrics"]}
            save_sealed(content | kept, self.best(stage))
            self._best_written = stage, best["metrics"]
            if stage == "phase2":
                self.say(f"Saved best model (val loss {best['metrics']['loss']:.4f}) to {self.best(stage)}")
        write_state(self.folder, content, self.config.keep_last, names)
        self.saved_at = datetime.fromisoformat(content["saved_at"]).timestamp()
        if self.mirror:
            frozen = frozen_path(self.folder, content["frozen"]).name
            bests = [self.best(name).name for name in ("untrained", "phase2")]
            names = [frozen, *bests, "model_phase1.pt", LATEST, MANIFEST, *self._to_copy]
            self.mirror.request(names, content["save_number"])  # which copies none twice

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
            "made": self.made,
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


def write_state(folder, content, keep_last=0, names=()):
    """Make a state the latest of its folder; the latest becomes the previous one.

    Args:
        keep_last: how many `model_step_{n}.pt`, after n optimizer steps of the run, to keep beside these two.
        names: further names for it, such as "model_epoch.pt".

    Raises:
        OSError: it could not be written in ATTEMPTS tries; the files that were there are untouched.
    """
    latest = folder / LATEST
    begins = content["save_number"] == 1  # what has the name is then a run that is kept elsewhere
    for attempt in range(ATTEMPTS):
        try:
            digest = save_sealed(content, latest, None if begins else folder / PREVIOUS)
            break
        except OSError:
            if attempt + 1 == ATTEMPTS:
                raise
            time.sleep(WAIT * 2**attempt)
    if keep_last:
        duplicate(latest, folder / f"model_step_{content['step']:08d}.pt")
        for path in runs.step_files(folder)[keep_last:]:
            path.unlink()
    for name in names:
        duplicate(latest, folder / name)
    announce(folder, content, digest)


def announce(folder, content, digest):
    """Write the manifest, which says what the latest state is; what else stands in it stays."""
    told = "run_id", "epoch", "stage", "step", "restart", "save_number", "saved_at"
    entry = {key: content[key] for key in told}
    entry |= {"file": LATEST, "sha256": digest, "bytes": (folder / LATEST).stat().st_size}
    with suppress(OSError, ValueError, TypeError):  # none yet, or damaged
        entry = json.loads((folder / MANIFEST).read_text(encoding="utf-8")) | entry
    write_text(folder / MANIFEST, json.dumps(entry, indent=1) + "\n")


def mended(folder, notes):
    """The newest whole state of a folder, or None; it becomes the latest, damaged files are set aside.

    Args:
        notes: list that gets a line for each file set aside.

    Raises:
        UserError: as `runs.newest`.
    """
    found, newest, damaged = runs.settle(folder)
    for path, error in damaged.items():
        number, aside = 1, path.with_name(path.name + ".corrupt")
        while aside.exists():
            number += 1
            aside = path.with_name(f"{path.name}.corrupt.{number}")
        path.rename(aside)
        notes.append(f"warning: {error}; kept as {aside.name}, continuing from {newest.name}")
    if found and newest.name != LATEST:
        duplicate(newest, folder / LATEST)
    return found


def recover(folder, mirror, notes):
    """Fetch second copies that are newer than what a folder has, as after a lost machine; of all runs.

    Args:
        mirror: folder of second copies. notes: list that gets a line when files were fetched.

    Raises:
        UserError: the mirror cannot be read.
    """
    try:
        ours = runs.settle(folder)[0]
    except UserError:  # all damaged
        ours = None
    theirs = runs.newest(mirror)[0]
    homes = {path.name: path for path in mirror.glob(f"{runs.RUNS}/*")} if ours is None else {}
    if theirs:
        homes[theirs["run_id"]] = mirror
    try:
        for run_id, source in homes.items():
            is_top = source == mirror and (ours is None or ours["run_id"] == run_id)
            home = folder if is_top else folder / runs.RUNS / run_id
            here, there = ours if is_top else runs.newest(home)[0], runs.newest(source)[0]
            if there is None or (here and here["save_number"] >= there["save_number"]):
                continue
            home.mkdir(parents=True, exist_ok=True)
            for path in sorted(source.glob("model_*.pt"), key=lambda path: path.name == LATEST):
                with suppress(Corrupt, FileNotFoundError):
                    if load_sealed(path, mmap=True).get("run_id", run_id) == run_id:
                        with open(path, "rb") as file:
                            copy_verified(file, home / path.name)
            notes.append(f"run {run_id} fetched from the mirror {mirror}, newer than what was here")
    except OSError as error:
        raise UserError(
            f"the mirror {mirror} cannot be read ({error.strerror or error}): mount it again."
        ) from error


def uncopied(folder, mirror):
    """Names of the states of the runs beside the one at the top that a mirror lacks."""

    def seal(path):
        with open(path, "rb") as file:
            file.seek(-64, os.SEEK_END)
            return path.stat().st_size, file.read()

    names = []
    for path in sorted(folder.glob(f"{runs.RUNS}/*/model_*.pt")):
        name = path.relative_to(folder)
        with suppress(OSError):
            if seal(mirror / name) == seal(path):
                continue
        names.append(name)
    return names


def store_frozen(folder, model):
    """Write the model's frozen tensors unless they are there already.

    Returns:
        Their digest, which a checkpoint carries in their place.
    """
    tensors = {name: tensor.cpu() for name, tensor in model.frozen_state().items()}
    digest = frozen_digest(tensors)
    if tensors and not frozen_path(folder, digest).exists():
        save_sealed(tensors, frozen_path(folder, digest))
    return digest


def snapshot(value):
    """The same structure with copies of all tensors, on the CPU: training goes on changing its own."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(part) for key, part in value.items()}
    return [snapshot(part) for part in value] if isinstance(value, list | tuple) else value


def place(content):
    """Where a state goes on, in words: "in Phase 2, epoch 12, batch 14 of 30 (sample 416 of 960), step 344".

    Args:
        content: of a checkpoint: its `stage`, its `position` (None between two stages) and its `step`.
    """
    stage, at = content["stage"], content["position"]
    if stage == "complete":
        return f"at its end, step {content['step']}"
    where, round_name = f"in {STAGE_NAMES[stage]}, ", "iteration" if stage == "phase1" else "epoch"
    if not at:
        where = f"at the beginning of {STAGE_NAMES[stage]}"
    elif at["sample"] == at["samples"]:
        where += f"{round_name} {at['epoch'] + 1}, its validation"
    elif at["epoch"] >= at["epochs"] and not at["sample"]:
        where += f"after {round_name} {at['epoch']}"
    else:
        where += f"{round_name} {at['epoch'] + 1}, batch {at['batch'] + 1} of {at['batches']} "
        where += f"(sample {at['sample']} of {at['samples']})"
    return f"{where}, step {content['step']}"


def require_space(folder, model, config, context_dtype):
    """Refuse to begin what the disk cannot hold: states of weights, two moments of each, and contexts.

    Raises:
        UserError: the folder has too little room for the checkpoints and files of a run.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.trained_state().values())
    values = config.train_tokens * config.context_dim
    copies = 2 if in_files(values, context_dtype, config.context_memory_mb) else STATES_ON_DISK
    needed = STATES_ON_DISK * 3 * weights + copies * values * context_dtype.itemsize
    stats = map(Path.stat, Path(folder).glob("model_*.pt"))
    present = {(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}  # hard links count once
    needed, free = needed - sum(present.values()), shutil.disk_usage(folder).free
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
        found = subprocess.run(["git", "rev-parse", "HEAD"], **settings).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    return {"versions": versions, "git_commit": found or None}
