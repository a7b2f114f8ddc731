"""The runs that a checkpoint folder holds: their files, which of them the settings say, what others lend it.

A run is what its settings and data say. The one that wrote last lies at the top of the folder, every other
one whole, by the same names, in `runs/RUN_ID/`. Changing runs renames files; `model_latest.pt` at the top is
replaced, so a whole one is there at every instant. As each state carries its run's id, the files themselves
tell a change that was cut off, and `mended` ends it.
"""

import itertools
import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from newllm.config import EARLIER, Config, settings_of
from newllm.errors import UserError
from newllm.retrieval.mixture import FORMAT as RETRIEVAL_FORMAT
from newllm.saving.files import Corrupt, copy_verified, duplicate, ending, load_sealed, write_text
from newllm.saving.guard import MANIFEST, read_manifest

FORMAT = 4  # of states and of model files
RUNS, LATEST, PREVIOUS = "runs", "model_latest.pt", "model_prev.pt"
CONTROL = "model_untrained_best.pt"  # the head on untrained contexts, at its lowest validation loss
FILES = "model_*.pt*", "contexts_*.bin", "status.json"  # of a run, besides the manifest of the folder
TOLD = "run_id", "epoch", "stage", "step", "restart", "save_number", "saved_at"  # by the manifest of a state

SHAPES = {name: setting.shapes.split() for name, setting in settings_of(Config).items()}
WHOLE = {"data", "budget", "model"}
BATCHES = {name for name, setting in settings_of(Config).items() if setting.until_done}
# What a new run may take from another one, and what shapes it: (stage, marks, how a person calls it).
PARTS = {
    "ngrams": ("untrained", {"data", "budget"}, "the n-gram counts"),
    "contexts": ("untrained", WHOLE | {"untrained"}, "the figures of untrained contexts"),
    "head": ("untrained", WHOLE | {"control"}, "the head on them"),
    "counting": ("untrained", {"data", "budget", "retrieval"}, "retrieval without a network"),
    "by_contexts": ("untrained", WHOLE | {"retrieval"}, "retrieval by untrained contexts"),
    "retrieval": ("untrained", WHOLE | {"control", "retrieval"}, "retrieval on that head"),
    "phase1": ("phase1", WHOLE | {"phase1"}, "Phase 1"),
    "phase2": ("phase2", WHOLE | {"phase1", "phase2"}, "Phase 2"),
}


def states(folder):
    """Every file of a folder that may hold a state to continue from, the latest first."""
    found = [path for path in folder.glob("model_*.pt") if not re.search("best|frozen|retrieval", path.name)]
    return sorted(found, key=lambda path: (path.name != LATEST, path.name))


def newest(folder, mmap=True):
    """The newest whole state of a folder; the latest, if it is whole.

    Returns:
        (state, its path, {path: what is wrong} of damaged files); (None, None, {}) without any file.

    Raises:
        UserError: there are files, and none is whole; one cannot be looked at, or is of another version.
    """
    found, place, damaged = None, None, {}
    for path in states(Path(folder)):
        try:
            state = load_sealed(path, mmap=mmap)
        except Corrupt as error:
            damaged[path] = error
            continue
        except OSError as error:  # also a link to nowhere
            reason = error.strerror or error
            raise UserError(f"{path} cannot be read ({reason}): mend that or move it away.") from error
        if found is None or state["save_number"] > found["save_number"]:
            found, place = state, path
        if path.name == LATEST:
            break  # the usual case needs no other file
    if damaged and found is None:
        raise UserError(
            f"no checkpoint in {folder} can be read ({next(iter(damaged.values()))}): put a whole copy in "
            "its place, or move the files away to start a new run."
        )
    if found is not None:
        require_format(found, place)
    return found, place, damaged


def newest_state(folder, mmap=True):
    """The newest whole state of a folder, or None; raises as `newest`."""
    return newest(folder, mmap)[0]


def require_format(content, path):
    """Raises UserError where a file is of another version."""
    if content.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {content.get('format')}, this version continues {FORMAT}: use the version "
            "that wrote it, move it away, or choose another --checkpoint_dir."
        )


def mended(folder, notes):
    """As `newest`, for who writes: damaged files are set aside, a change of runs that was cut off is ended.

    Args:
        notes: list that gets a line for each file set aside.
    """
    state, place, damaged = newest(folder)
    for path, error in damaged.items():
        path.replace(f"{path}.corrupt")
        notes.append(f"warning: {error}; kept as {path.name}.corrupt, continuing from {place.name}")
    if state and place.name != LATEST:
        duplicate(place, folder / LATEST)
    if state and (folder / RUNS / state["run_id"]).is_dir():
        bring_up(folder, state)
    return state


def runs_in(folder, top):
    """[(its folder, its newest state or None)] of the run at the top and those beside it, latest id first.

    The checksum of a state beside it is looked at only if the latest file cannot be opened: who uses one
    reads it again.
    """
    found = [(folder, top)] if top else []
    for home in sorted(folder.glob(f"{RUNS}/*"), reverse=True):
        if not home.is_dir() or (top and home.name == top["run_id"]):
            continue
        try:
            state = torch.load(home / LATEST, map_location="cpu", weights_only=True, mmap=True)
            require_format(state, home)
        except Exception:  # what is no state fails in every way
            try:
                state = newest_state(home)
            except UserError:
                state = None
        found.append((home, state))
    return found


def announce(folder, state):
    """Write into the manifest what the latest state is, for status; what else stands in it stays."""
    size, seal = ending(folder / LATEST)
    entry = {key: state[key] for key in TOLD} | {"file": LATEST, "sha256": seal, "bytes": size}
    write_text(folder / MANIFEST, json.dumps(read_manifest(folder) | entry, indent=1) + "\n")


# Changing runs


def files_of(home):
    return [path for pattern in FILES for path in home.glob(pattern)]


def bytes_of(home):
    """What the files of a run take on the disk, further names aside."""
    stats = map(os.stat, files_of(home))
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())


def park(folder, run_id):
    """Move the run at the top aside; `model_latest.pt` gets a second name, as the next save replaces it."""
    home = folder / RUNS / run_id
    home.mkdir(parents=True, exist_ok=True)
    duplicate(folder / LATEST, home / LATEST)
    for path in files_of(folder):
        if path.name != LATEST:
            os.replace(path, home / path.name)


def bring_up(folder, state):
    """Move a run to the top, its latest first: if this is cut off, the id at the top says to go on."""
    home = folder / RUNS / state["run_id"]
    for path in sorted(files_of(home), key=lambda path: path.name != LATEST):
        os.replace(path, folder / path.name)
    with suppress(OSError):  # somebody's own files stay
        home.rmdir()
    announce(folder, state)


def change(folder, top, home, notes):
    """Park the run at the top, if there is one, and bring up the one in `home`, if it is one.

    Raises:
        UserError: the disk refuses.
    """
    try:
        found = mended(home, notes) if home else None
        if top:
            park(folder, top["run_id"])
        if found:
            bring_up(folder, found)
    except OSError as error:
        raise UserError(
            f"the run in {folder} cannot be changed ({error.strerror or error}): mend that and start again; "
            "nothing is lost."
        ) from error


def home_of(folder, run_id):
    """Where a run of a folder lies by now."""
    beside = folder / RUNS / run_id
    return beside if beside.is_dir() else folder


def unused_id(folder, run_id):
    """The id, or with the first number that makes it one which no run and no record of the folder has."""
    number, candidate = 1, run_id
    while (folder / RUNS / candidate).exists() or any(folder.glob(f"*/logs/metrics_{candidate}.jsonl")):
        number += 1
        candidate = f"{run_id}_{number}"
    return candidate


def remove(folder, run_id):
    """Delete the checkpoints of a run beside the top; record and artefacts stay. Returns bytes freed.

    Raises:
        UserError: there is none of this id.
    """
    beside = Path(folder) / RUNS
    home = beside / run_id
    if not run_id or home.parent != beside or not home.is_dir():
        raise UserError(f"no run {run_id} lies in {beside}, and the one at the top of {folder} stays.")
    freed = bytes_of(home)
    shutil.rmtree(home)
    return freed


def run_rows(folder):
    """(id, state, val ppl, MB on disk, last save, settings unlike those at the top) of each run."""
    folder, rows = Path(folder), []
    top = newest_state(folder)
    for home, state in runs_in(folder, top):
        row = [home.name, "cannot be read", "", f"{bytes_of(home) / 1e6:.1f}", "", ""]
        if state:
            head = state["results"].get("phase2", {}).get("head")
            row[:3] = state["run_id"], state["restart"], f"{head['ppl']:.1f}" if head else ""
            row[4:] = state["saved_at"], listed(changed(top["config"], state["config"])) if top else ""
        if home == folder:
            row[5] = "(at the top)"
        rows.append(row)
    return rows


# Which run the settings say


def shaping(settings, *others):
    """Those of some settings that shape a run's figures (unknown ones do), without those of other marks."""
    marks = {name: set(SHAPES.get(name, ["data"])) for name in settings}
    return {name: value for name, value in settings.items() if marks[name] and not marks[name] & set(others)}


def changed(saved, now, marks=None):
    """{name: (saved value, value now)} of settings that shape a figure (of some marks) and differ."""
    old = EARLIER | saved
    changes = {name: (old.get(name), new) for name, new in shaping(now).items() if old.get(name) != new}
    return {name: change for name, change in changes.items() if not marks or marks & set(SHAPES[name])}


def listed(changes):
    return ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changes.items())


def distinction(state, config, fingerprint):
    """What makes these settings and data another run than that of a state, in words; "" if it is the same.

    That is what shaped a figure which the run has made, or has begun to make. What is ahead of it may change.
    """
    untrained = state["results"].get("untrained", {})
    stages = "phase1", "phase2", "retrieval"
    done = {stage for stage in stages if state["results"].get(stage)}  # {} where it had nothing to do
    marks = WHOLE | done
    if state["position"]:
        marks.add("control" if state["stage"] == "untrained" else state["stage"])
    if "contexts" in untrained:
        marks |= {"untrained", "row"}
    if "head" in untrained:
        marks.add("control")
    looked_up = "retrieval" in done or {"retrieval", "counting"} & untrained.keys()
    if state["stage"] == "complete" or looked_up:
        marks.add("retrieval")
    ahead = {"phase1", "phase2"} - done
    if config.phase == "1":
        ahead.discard("phase2")
    changes = changed(state["config"], config.to_dict(), marks)
    for name in BATCHES & changes.keys():
        if SHAPES[name][-1] in ahead:
            del changes[name]
    if not changes and state["data_fingerprint"] != fingerprint:
        return "other data: the source or its text"
    if not changes and looked_up and (made := state.get("retrieval_format")) != RETRIEVAL_FORMAT:
        return f"its retrieval has format {made}, this version makes {RETRIEVAL_FORMAT}"
    return listed(changes)


@dataclass
class Choice:
    """What a run with some settings and data finds in its folder.

    Attributes:
        home: folder of the run to continue, None for a new one. lines: what to say of it.
        reused: {part of the untrained row: its results} of other runs. stages: {"phase1" or "phase2": the
            state with that stage of another run}. record: the rows of these parts in the other runs' records.
    """

    home: Path | None = None
    lines: list = field(default_factory=list)
    reused: dict = field(default_factory=dict)
    stages: dict = field(default_factory=dict)
    record: list = field(default_factory=list)


def choose(folder, top, config, fingerprint):
    """Which run of a folder the settings and the data say, and what it takes over; nothing is changed.

    Args:
        top: the state at its top, or None.
    """
    folder, choice, known = Path(folder), Choice(), []
    for home, state in runs_in(folder, top):
        if state:
            known.append((home, state, distinction(state, config, fingerprint)))
        else:
            choice.lines.append(f"warning: {home} holds no run that this version can read; it stays as it is")
    kept = ""
    if top and config.save_checkpoint:
        kept = f"; run {top['run_id']} is kept whole in {RUNS}/{top['run_id']}"
    if not known:
        return choice
    if not config.load_checkpoint:
        choice.lines.append(f"load_checkpoint is off: a new run{kept}")
        return choice
    mine = [(home, state) for home, state, difference in known if not difference]
    mine.sort(key=lambda run: bool(changed(run[1]["config"], config.to_dict())))
    if mine:
        choice.home, state = mine[0]
        line = f"back to run {state['run_id']}, the one of these settings{kept}; "
        if choice.home == folder:
            line = ""
    else:
        _, nearest, difference = known[0]
        line = f"another run than {nearest['run_id']} ({difference}){kept}; "
    if not mine or state["stage"] == "untrained":
        lenders = [(home, state) for home, state, _ in known if home != choice.home]
        taken = ", ".join(_borrow(choice, lenders, config, fingerprint)) or "nothing"
        line += f"taken over: {taken}; all else is trained"
    if line:
        choice.lines.append(line.removesuffix("; "))
    return choice


def _borrow(choice, lenders, config, fingerprint):
    """Take each part from the first run that has it by equal settings; returns in words what was taken."""
    taken = {}
    for (home, state), (part, (stage, marks, title)) in itertools.product(lenders, PARTS.items()):
        results = state["results"].get(stage, {})
        has = results if part == stage else part in results
        wanted = part not in taken and (config.untrained_control or part not in ("head", "retrieval"))
        if not (has and wanted and _made_alike(state, config, fingerprint, marks)):
            continue
        try:
            whole = load_sealed(home / "model_phase1.pt") if part == "phase1" else newest_state(home)
        except (Corrupt, OSError, UserError) as error:
            choice.lines.append(f"warning: {error}; {title} is made anew")
            continue
        taken[part] = title, state["run_id"]
        if part == stage:
            choice.stages[part] = whole
        else:
            choice.reused[part] = whole["results"]["untrained"][part]
        if part in ("head", "phase1", "phase2"):
            choice.record += [row for row in whole["record"] if json.loads(row)["stage"] == stage]
    by_run = itertools.groupby(taken.values(), key=lambda each: each[1])
    return [f"{', '.join(title for title, _ in titles)} (of run {run_id})" for run_id, titles in by_run]


def _made_alike(state, config, fingerprint, marks):
    """Whether what these marks shape is the same by a state's settings and data and by these."""
    same = state["data_fingerprint"] == fingerprint
    if "retrieval" in marks:
        same = same and state.get("retrieval_format") == RETRIEVAL_FORMAT
    return same and not changed(state["config"], config.to_dict(), marks)


def control_of(folder, config, fingerprint):
    """(its folder, best state) of the head on untrained contexts, of a run that trained it.

    Raises:
        FileNotFoundError: there is none that can be read.
    """
    folder = Path(folder)
    for _, state in runs_in(folder, newest_state(folder)):
        made = state and "head" in state["results"].get("untrained", {})
        if made and _made_alike(state, config, fingerprint, PARTS["head"][1]):
            home = home_of(folder, state["run_id"])  # beside the top, before the first save of the next run
            with suppress(OSError):
                return home, load_sealed(home / CONTROL)
    raise FileNotFoundError(CONTROL)


# Second copies


def fetch(folder, mirror, notes):
    """Bring back of a mirror what a folder has lost, or has older than its second copies.

    Raises:
        UserError: the mirror cannot be read.
    """
    try:
        ours = mended(folder, notes)
    except UserError:  # all damaged
        ours = None
    theirs = newest_state(mirror)
    sources = {path.name: path for path in mirror.glob(f"{RUNS}/*")} if ours is None else {}
    if theirs:
        sources[theirs["run_id"]] = mirror
    try:
        for run_id, source in sources.items():
            at_top = source == mirror and (ours is None or ours["run_id"] == run_id)
            home = folder if at_top else folder / RUNS / run_id
            here, there = ours if at_top else newest_state(home), newest_state(source)
            if there and (here is None or there["save_number"] > here["save_number"]):
                _copy_run(source, home, run_id)
                notes.append(f"run {run_id} fetched from the mirror {mirror}, newer than what was here")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"the mirror {mirror} cannot be read ({reason}): mount it again.") from error


def _copy_run(source, home, run_id):
    """Copy what is whole of a run, its latest last."""
    home.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("model_*.pt"), key=lambda path: path.name == LATEST):
        with suppress(Corrupt, FileNotFoundError):
            if load_sealed(path, mmap=True).get("run_id", run_id) == run_id:
                with open(path, "rb") as file:
                    copy_verified(file, home / path.name)
