"""The runs that a checkpoint folder holds: which of them the settings say, and what others take from it.

A run is what its settings and data say. The one that wrote last lies at the top of the folder, every other
one whole, by the same names, in `runs/RUN_ID/`. Changing runs renames files; `model_latest.pt` at the top is
replaced, so a whole one is there at every instant. As each state carries its run's id, the files themselves
tell a change that was cut off, and `settle` ends it.
"""

import itertools
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from newllm.config import EARLIER, Config, settings_of
from newllm.errors import UserError
from newllm.saving.files import Corrupt, duplicate, load_sealed

FORMAT = 4  # of a state; 3, whose weights can still be read, counts the place inside an epoch in batches
RUNS, LATEST, PREVIOUS, MANIFEST = "runs", "model_latest.pt", "model_prev.pt", "manifest.json"
MOVED = "model_*.pt", "model_*.pt.corrupt*", "contexts_*.bin", "status.json"  # of a run, besides its manifest
MACHINE = "torch", "device", "precision", "compile"  # what else the bits of a figure depend on

SHAPES = {name: setting.shapes.split() for name, setting in settings_of(Config).items()}
WHOLE = {"data", "budget", "model"}
BATCHES = {name for name, setting in settings_of(Config).items() if setting.until_done}
# What a new run may take from another one, and what shapes it: (stage, marks, how a person calls it).
PARTS = {
    "ngrams": ("untrained", {"data", "budget"}, "the n-gram counts"),
    "contexts": ("untrained", WHOLE | {"untrained"}, "the figures of untrained contexts"),
    "head": ("untrained", WHOLE | {"control"}, "the head on them"),
    "phase1": ("phase1", WHOLE | {"phase1"}, "Phase 1"),
}


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


def distinction(found, config, fingerprint):
    """What makes these settings and data another run than that of a state, in words; "" if it is the same.

    That is what shaped a figure which the run has made, or has begun to make. What is ahead of it may change.
    """
    results, begun = found["results"], found["stage"] if found["position"] else ""
    done = {
        stage for stage in ("phase1", "phase2") if results.get(stage)
    }  # without contexts Phase 1 leaves {}
    made = WHOLE | done | {"control" if begun == "untrained" else begun}
    if "contexts" in results.get("untrained", {}):
        made |= {"untrained", "row"}
    if "head" in results.get("untrained", {}):
        made |= {"control"}
    ahead = {"phase1", "phase2"} - done - ({"phase2"} if config.phase == "1" else set())
    changes = changed(found["config"], config.to_dict(), made)
    for name in BATCHES & changes.keys():
        if SHAPES[name][-1] in ahead:
            del changes[name]
    other_data = found["data_fingerprint"] != fingerprint
    return listed(changes) or ("other data: the source or its text" if other_data else "")


def bits_of(config):
    """All that the bits of a figure depend on, as a state's `made` keeps it for each stage."""
    return config.to_dict() | {"torch": str(torch.__version__)}


def same_bits(made, stage, config, marks):
    """Whether what some marks shape in a stage would be made with the same bits today."""
    saved, now = made.get(stage, {}), bits_of(config)
    return all(saved.get(name) == now[name] for name in MACHINE) and not changed(saved, now, marks)


def states(folder):
    """Every file of a folder that may hold a state to continue from, likely newest first."""
    kept = ("model_epoch.pt", "model_phase1.pt", "model_backup.pt")
    return [folder / LATEST, folder / PREVIOUS, *step_files(folder), *(folder / name for name in kept)]


def step_files(folder):
    """`model_step_{n}.pt`, the newest first."""
    return sorted(folder.glob("model_step_*.pt"), key=lambda path: (len(path.name), path.name), reverse=True)


def newest(folder):
    """The newest whole state of a folder, whose files are only read.

    The latest counts if it is whole: another file with more saves behind it is of an earlier run.

    Returns:
        (content, its path, {path: what is wrong} of damaged files that come before it); (None, None, {})
        without any file.

    Raises:
        UserError: there are files, and none is whole; or one cannot be looked at.
    """
    found, place, damaged = None, None, {}
    for path in states(Path(folder)):
        try:
            content = load_sealed(path, mmap=True)
        except Corrupt as error:
            damaged[path] = error
            continue
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not path.is_symlink():
                continue
            reason = "it is a link to nowhere" if path.is_symlink() else error.strerror or error
            raise UserError(f"{path} cannot be read ({reason}): mend that or move it away.") from error
        if found is None or content["save_number"] > found["save_number"]:
            found, place = content, path
        if path.name == LATEST:
            break  # the usual case needs no other file
    if damaged and found is None:
        raise UserError(
            f"no checkpoint in {folder} can be read ({next(iter(damaged.values()))}): put a whole copy in "
            "its place, or move the files away to start a new run."
        )
    return found, place, damaged


def runs_in(folder, top):
    """[(its folder, its newest state or None)] of the run at the top and those beside it, latest id first.

    The checksum of a state beside it is looked at only if the latest file cannot be opened: who uses one
    reads it again.
    """
    found = [(folder, top)] if top else []
    for home in sorted(folder.glob(f"{RUNS}/[!.]*"), reverse=True):
        if not home.is_dir() or (top and home.name == top["run_id"]):
            continue
        try:
            state = torch.load(home / LATEST, map_location="cpu", weights_only=True, mmap=True)
            found.append((home, state if state["save_number"] else None))
        except Exception:  # what is no state fails in every way
            try:
                found.append((home, newest(home)[0]))
            except UserError:
                found.append((home, None))
    return found


@dataclass
class Choice:
    """What a run with some settings and data finds in its folder.

    Attributes:
        home: folder of the run to continue, None for a new one. lines: what to say of it.
        taken: {part: (folder, state)} of the runs from which it may take a part that it has not begun.
    """

    home: Path | None = None
    lines: list = field(default_factory=list)
    taken: dict = field(default_factory=dict)


def choose(folder, top, config, fingerprint):
    """Which run of a folder the settings and the data say; nothing is changed.

    Args:
        top: content of the state at its top, or None.

    Raises:
        UserError: the top is of a version whose runs cannot be continued.
    """
    folder, choice, known = Path(folder), Choice(), []
    if top and top.get("format") != FORMAT:
        raise UserError(
            f"{folder / LATEST} has format {top.get('format')}, this version continues {FORMAT}: finish "
            "that run with the version that wrote it, move it away, or choose another --checkpoint_dir."
        )
    for home, state in runs_in(folder, top):
        if state and state.get("format") == FORMAT:
            known.append((home, state, distinction(state, config, fingerprint)))
        else:
            choice.lines.append(f"warning: {home} holds no run that this version can read; it stays as it is")
    kept = f"; run {top['run_id']} is kept whole in {RUNS}/{top['run_id']}" if top else ""
    if known and not config.load_checkpoint:
        choice.lines.append(f"load_checkpoint is off: a new run{kept}")
    if not known or not config.load_checkpoint:
        return choice
    mine = [(home, state) for home, state, difference in known if not difference]
    mine.sort(key=lambda run: bool(changed(run[1]["config"], config.to_dict())))
    if mine:
        choice.home, state = mine[0]
        line = (
            "" if choice.home == folder else f"back to run {state['run_id']}, the one of these settings{kept}"
        )
    else:
        _, nearest, difference = known[0] if top else min(known, key=lambda run: len(run[2]))
        line = f"another run than {nearest['run_id']} ({difference}){kept}"
    if not mine or state["stage"] == "untrained":
        choice.taken = _takings(known, choice.home, config, fingerprint)
        by_run = {}
        for part, (_, lender) in choice.taken.items():
            by_run.setdefault(lender["run_id"], []).append(PARTS[part][2])
        taken = ", ".join(f"{', '.join(names)} (of run {run_id})" for run_id, names in by_run.items())
        line += f"; taken over: {taken or 'nothing'}; all else is trained"
    choice.lines += [line.removeprefix("; ")] if line else []
    return choice


def _takings(known, own, config, fingerprint):
    """{part: (folder, state)} of the first other run that has the part with the bits of today."""
    found = {}
    for (home, state, _), part in itertools.product(known, PARTS):
        stage, marks, _ = PARTS[part]
        has = part in state["results"].get("untrained", {}) or (
            part == "phase1" and state["results"].get(part)
        )
        wanted = home != own and (part != "head" or config.untrained_control)
        same_data = state["data_fingerprint"] == fingerprint
        if wanted and has and same_data and same_bits(state.get("made", {}), stage, config, marks):
            found.setdefault(part, (home, state))
    return found


def unused_id(folder, run_id):
    """The id, or with the first number that makes it one which no run and no record of the folder has."""
    number, candidate = 1, run_id
    while (folder / RUNS / candidate).exists() or any(folder.glob(f"*/logs/metrics_{candidate}.jsonl")):
        number += 1
        candidate = f"{run_id}_{number}"
    return candidate


def _files(folder):
    return [path for pattern in MOVED for path in folder.glob(pattern)]


def park(folder, run_id):
    """Move the run at the top aside; `model_latest.pt` gets a second name, as the next save replaces it."""
    home = folder / RUNS / run_id
    home.mkdir(parents=True, exist_ok=True)
    for name in (LATEST, MANIFEST):
        if (folder / name).exists():
            duplicate(folder / name, home / name)
    for path in _files(folder):
        if path.name != LATEST:
            os.replace(path, home / path.name)


def bring_up(folder, run_id):
    """Move a run to the top, its latest first: if this is cut off, the id at the top says to go on.

    The manifest there, which also says who writes, stays for its writer to renew.
    """
    home = folder / RUNS / run_id
    for path in sorted(_files(home), key=lambda path: path.name != LATEST):
        os.replace(path, folder / path.name)
    (home / MANIFEST).unlink(missing_ok=True)
    with suppress(OSError):  # somebody's own files stay
        home.rmdir()


def settle(folder):
    """The newest whole state at the top, as by `newest`, once a change of runs that was cut off has ended."""
    top = newest(folder)
    if top[0] and (folder / RUNS / top[0]["run_id"]).is_dir():
        bring_up(folder, top[0]["run_id"])
        return newest(folder)
    return top


def run_rows(folder):
    """(id, state, val ppl, MB on disk, last save, settings unlike those of the run at the top) of each run.

    Raises:
        UserError: the files at the top cannot be read.
    """
    folder, rows = Path(folder), []
    top = newest(folder)[0]
    for home, state in runs_in(folder, top):
        size = f"{_bytes_of(home) / 1e6:.1f}"
        if state is None:
            rows.append((home.name, "cannot be read", "", size, "", ""))
            continue
        stage = "complete" if state["stage"] == "complete" else state["restart"]
        head = state["results"].get("phase2", {}).get("head") or (state["stage_state"] or {}).get("best")
        ppl = f"{head['ppl']:.1f}" if head and state["stage"] != "untrained" else ""
        differs = listed(changed(top["config"], state["config"])) if top else ""
        differs = "(at the top)" if home == folder else differs
        rows.append((state["run_id"], stage, ppl, size, state["saved_at"], differs))
    return rows


def _bytes_of(home):
    """What the files of a run take on disk; several names of one count once."""
    stats = map(os.stat, _files(home))
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())


def remove(folder, run_id):
    """Delete the checkpoints of a run beside the top; record and artefacts stay. Returns bytes freed.

    Raises:
        UserError: there is none of this id.
    """
    beside = Path(folder) / RUNS
    home = beside / run_id
    if not run_id or home.parent != beside or not home.is_dir():
        raise UserError(
            f"no run {run_id} lies in {beside}, and the one at the top of {folder} is in use: it stays."
        )
    freed, aside = _bytes_of(home), home.with_name(f".{run_id}.removed")
    home.rename(aside)  # whole or gone, also where this is cut off
    shutil.rmtree(aside)
    return freed
