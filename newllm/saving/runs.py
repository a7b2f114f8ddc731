"""The runs that a checkpoint folder holds: which of them the settings say, and what another one may take from it.

A run is what its settings and data say. The one that wrote last lies at the top of the folder, every other one whole, by the
same names, in `runs/RUN_ID/`. Changing runs renames files; `model_latest.pt` at the top is replaced, so a whole one is there at
every instant. As each state carries its run's id, the files themselves tell a change that was cut off, and `settle` ends it.
"""

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from newllm.config import EARLIER, field_types
from newllm.errors import UserError
from newllm.saving.files import Corrupt, duplicate, load_sealed

FORMAT = 4  # of a state; 3, whose weights can still be read, counts the place inside an epoch in batches
RUNS, LATEST, PREVIOUS, MANIFEST = "runs", "model_latest.pt", "model_prev.pt", "manifest.json"
MOVED = "model_*.pt", "model_*.pt.corrupt*", "contexts_*.bin", "status.json"  # of a run, besides its manifest
STAGE_NAMES = {"untrained": "the untrained row", "phase1": "Phase 1", "phase2": "Phase 2"}

# What each setting shapes. "data", "model", "budget": the whole run. A stage, or several: its figures; "control" is the head on
# untrained contexts, trained as in Phase 2, and "row" whether there is one. "": no figure, only where and how they are made.
SHAPES = {
    name: stages.split()
    for stages, names in {
        "data": "data_source data_split data_column tokenizer vocab_size max_seq_length val_samples tune_share seed",
        "budget": "num_samples num_tokens",
        "model": "preset model_type context_dim embed_dim num_layers token_layers tie_weights embeddings init_scale",
        "row": "untrained_control",
        "untrained phase1": "phase1_convergence_threshold phase1_min_converged_ratio",
        "phase1": "phase1_max_iterations phase1_learning_rate phase1_batch_size phase1_shuffle dist_reg "
        "dist_reg_weight context_noise",
        "control phase1 phase2": "min_batches grad_clip",
        "control phase2": "phase2_epochs phase2_learning_rate phase2_batch_size dropout warmup_ratio patience "
        "weight_decay whiten_context",
        "phase2": "context_lr_scale gradient_sweeps token_dropout freeze_context context_adapter adapter_rank",
        "": "phase val_quick_frac val_quick_every_n_batches device precision context_memory_mb compile attention "
        "gpu_memory_fraction cache_dir save_checkpoint load_checkpoint checkpoint_dir save_every_n_batches "
        "save_min_seconds save_every_minutes keep_last backup_dir backup_every_minutes max_minutes artifacts trackers",
    }.items()
    for name in names.split()
}
if missing := sorted(set(field_types()) - set(SHAPES)):
    raise TypeError(f"SHAPES does not say what the setting '{missing[0]}' shapes: add it there")
WHOLE = {"data", "budget", "model"}
BATCHES = {
    "phase1_batch_size",
    "phase2_batch_size",
    "min_batches",
}  # may change until their last stage is done
PARTS = {  # what a new run may take from another one, and what shapes it; "made" of a state has its stage's settings
    "ngrams": ("untrained", {"data", "budget"}, "the n-gram counts"),
    "contexts": ("untrained", WHOLE | {"untrained"}, "the figures of untrained contexts"),
    "head": ("untrained", WHOLE | {"control"}, "the head on them"),
    "phase1": ("phase1", WHOLE | {"phase1"}, "Phase 1"),
}


def shaping(settings, *others):
    """Those of some settings that shape a run's figures (one of an earlier version does), without those of the other marks."""
    marks = {name: set(SHAPES.get(name, ["data"])) for name in settings}
    return {name: value for name, value in settings.items() if marks[name] and not marks[name] & set(others)}


def changed(saved, now):
    """{name: (saved value, value now)} of the settings that shape a figure and differ."""
    before = EARLIER | saved
    return {
        name: (before.get(name), value) for name, value in shaping(now).items() if before.get(name) != value
    }


def with_marks(changes, marks):
    return {name: change for name, change in changes.items() if marks & set(SHAPES[name])}


def listed(changes):
    return ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changes.items())


def made(found):
    """{mark: what a person calls it} of all whose figures a state holds, or has begun to make."""
    results, begun = found["results"], found["stage"] if found["position"] else ""
    row, marks = results.get("untrained", {}), {}
    if "contexts" in row:
        marks |= {"untrained": STAGE_NAMES["untrained"], "row": STAGE_NAMES["untrained"]}
    if "head" in row or begun == "untrained":
        marks["control"] = STAGE_NAMES["untrained"]
    for stage in ("phase1", "phase2"):
        if results.get(stage) or begun == stage:  # a model without contexts passes Phase 1 with none
            marks[stage] = STAGE_NAMES[stage]
    return marks


def distinction(found, config, fingerprint):
    """In words what makes these settings and data another run than that of a state; "" when it is the same one."""
    changes = changed(found["config"], config.to_dict())
    ahead = {"phase1", "phase2"} - {stage for stage in found["results"] if found["results"][stage]}
    ahead -= {"phase2"} if config.phase == "1" else set()
    still_open = {name for name in BATCHES if SHAPES[name][-1] in ahead}
    fixed = with_marks(changes, WHOLE | made(found).keys())
    if others := {name: change for name, change in fixed.items() if name not in still_open}:
        return listed(others)
    return "other data: the source or its text" if found["data_fingerprint"] != fingerprint else ""


def warning_of(found, config):
    """A line on settings that differ from those a run was saved with and do not make it another one, or None."""
    changes = changed(found["config"], config.to_dict())
    kept = dict.fromkeys(name for mark, name in made(found).items() if with_marks(changes, {mark}))
    figures = f"; the figures of {' and '.join(kept)} stay those of the old ones" if kept else ""
    return (
        f"warning: settings changed since the checkpoint was written: {listed(changes)}{figures}"
        if changes
        else None
    )


def bits_of(config):
    """The settings with what else the bits of a figure depend on, as a state's `made` keeps them for each stage."""
    return config.to_dict() | {"torch": str(torch.__version__)}


def same_bits(saved, config, marks):
    """Whether a part made with the settings `saved` (those of `bits_of`) would be made with the same bits today."""
    now = bits_of(config)
    machine = all(saved.get(name) == now[name] for name in ("torch", "device", "precision", "compile"))
    return machine and not with_marks(changed(saved, now), marks)


def made_so_far(found, config):
    """The settings by which the stages of a state were made, by stage; {} of one that is made by several."""
    stages, stage = dict(found.get("made", {})), found["stage"]
    marks = WHOLE | {"untrained", "control"} if stage == "untrained" else WHOLE | {stage}
    if found["position"] and not same_bits(stages.get(stage, {}), config, marks):
        stages[stage] = {}
    return stages


def states(folder):
    """Every file of a folder that may hold a state to continue from, likely newest first."""
    folder = Path(folder)
    kept = ("model_epoch.pt", "model_phase1.pt", "model_backup.pt")
    return [folder / LATEST, folder / PREVIOUS, *step_files(folder), *(folder / name for name in kept)]


def step_files(folder):
    """`model_step_{n}.pt`, the newest first."""
    found = folder.glob("model_step_*.pt")
    return sorted(found, key=lambda path: int(path.stem.rpartition("_")[2]), reverse=True)


def newest(folder):
    """The newest whole state of a folder, whose files are only read.

    The latest counts if it is whole: another file with more saves behind it is of an earlier run.

    Returns:
        (content, its path, {path: what is wrong} of damaged files that come before it); (None, None, {}) without any file.

    Raises:
        UserError: there are files, and none is whole; or one cannot be looked at.
    """
    found, place, damaged = None, None, {}
    for path in states(folder):
        try:
            content = load_sealed(path, mmap=True)
        except FileNotFoundError:
            if path.is_symlink():
                raise UserError(
                    f"{path} is a link to nowhere: mount what it leads to, or remove the link."
                ) from None
            continue
        except Corrupt as error:
            damaged[path] = error
            continue
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror or error}): mend that or move it away."
            ) from error
        if found is None or content["save_number"] > found["save_number"]:
            found, place = content, path
        if path.name == LATEST:
            break  # the usual case needs no other file
    if damaged and found is None:
        raise UserError(
            f"no checkpoint in {folder} can be read ({next(iter(damaged.values()))}): put a whole copy in its place, or "
            "move the files away to start a new run."
        )
    return found, place, damaged


def parked(folder):
    """[(its folder, its newest state or None)] of the runs beside the one at the top, the latest id first.

    The checksum of a state is looked at only where the latest file cannot be opened: who uses a state reads it again.
    """
    found = []
    for home in sorted(path for path in Path(folder).glob(f"{RUNS}/[!.]*") if path.is_dir()):
        try:
            state = torch.load(home / LATEST, map_location="cpu", weights_only=True, mmap=True)
            state["save_number"]
        except Exception:  # what is no state fails in every way
            try:
                state = newest(home)[0]
            except UserError:
                state = None
        found.append((home, state))
    return found[::-1]


@dataclass
class Choice:
    """What a run with some settings and data finds in its folder.

    Attributes:
        top: state at the top, or None. home: folder of the run to continue, None for a new one.
        lines: what to say of it. taken: {part: (folder, state)} of the runs from which a new one takes a part.
    """

    top: dict | None
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
    folder, choice = Path(folder), Choice(top)
    if top and top.get("format") != FORMAT:
        raise UserError(
            f"{folder / LATEST} has format {top.get('format')}, this version continues {FORMAT}: finish that run with the "
            "version that wrote it, move it away, or choose another --checkpoint_dir."
        )
    beside = [(home, state) for home, state in parked(folder) if not top or home.name != top["run_id"]]
    for home, state in beside:
        if state is None or state.get("format") != FORMAT:
            choice.lines.append(f"warning: {home} holds no run that this version can read; it stays as it is")
    runs = [(folder, top)] if top else []
    runs += [(home, state) for home, state in beside if state and state.get("format") == FORMAT]
    kept = f"; run {top['run_id']} is kept whole in {RUNS}/{top['run_id']}" if top else ""
    if not runs:
        return choice
    if not config.load_checkpoint:
        choice.lines.append(f"load_checkpoint is off: a new run{kept}")
        return choice
    reasons = [distinction(state, config, fingerprint) for _, state in runs]
    mine = [run for run, reason in zip(runs, reasons, strict=True) if not reason]
    exact = [run for run in mine if not changed(run[1]["config"], config.to_dict())]
    line = ""
    if mine:
        choice.home, state = (exact or mine)[0]
        if choice.home != folder:
            line = f"back to run {state['run_id']}, the one of these settings{kept}"
    else:
        nearest = 0 if top else min(range(len(runs)), key=lambda at: len(reasons[at]))
        line = f"another run than {runs[nearest][1]['run_id']} ({reasons[nearest]}){kept}"
    if not mine or state["stage"] == "untrained":
        choice.taken = takings([run for run in runs if run[0] != choice.home], config, fingerprint)
        names = [f"{PARTS[part][2]} (of run {run[1]['run_id']})" for part, run in choice.taken.items()]
        line += f"; taken over: {', '.join(names) or 'nothing'}; all else is trained"
    choice.lines += [line.removeprefix("; ")] if line else []
    return choice


def takings(runs, config, fingerprint):
    """{part: (folder, state)} of the runs, in their order, that have a part with the bits it would have today."""
    found = {}
    for home, state in runs:
        row = state["results"].get("untrained", {})
        for part, (stage, marks, _) in PARTS.items():
            wanted = part != "head" or config.untrained_control
            has = part in row or (part == "phase1" and state["results"].get("phase1"))
            settings = state.get("made", {}).get(stage, {})
            alike = state["data_fingerprint"] == fingerprint and same_bits(settings, config, marks)
            if wanted and has and alike and part not in found:
                found[part] = home, state
    return found


def unused_id(folder, run_id):
    """The id, or with the first number that makes it one which no run and no record of the folder has."""
    folder, number, candidate = Path(folder), 1, run_id
    while (folder / RUNS / candidate).exists() or any(folder.glob(f"*/logs/metrics_{candidate}.jsonl")):
        number += 1
        candidate = f"{run_id}_{number}"
    return candidate


def _files(folder):
    return [path for pattern in MOVED for path in Path(folder).glob(pattern)]


def park(folder, run_id):
    """Move the run at the top aside, all but `model_latest.pt`, which gets a second name: the next save replaces it."""
    home = Path(folder) / RUNS / run_id
    home.mkdir(parents=True, exist_ok=True)
    for name in (LATEST, MANIFEST):
        if (Path(folder) / name).exists():
            duplicate(Path(folder) / name, home / name)
    for path in _files(folder):
        if path.name != LATEST:
            os.replace(path, home / path.name)


def bring_up(folder, run_id):
    """Move a run to the top, its latest first: whenever this is cut off, the id at the top says that it has to go on."""
    home = Path(folder) / RUNS / run_id
    for path in sorted(_files(home), key=lambda path: path.name != LATEST):
        os.replace(path, Path(folder) / path.name)
    if (home / MANIFEST).exists():
        os.replace(home / MANIFEST, Path(folder) / MANIFEST)
    with suppress(OSError):  # somebody's own files stay
        home.rmdir()


def settle(folder):
    """The newest whole state at the top, as `newest` gives it, after a change of runs that was cut off has been ended."""
    top = newest(folder)
    if top[0] and (Path(folder) / RUNS / top[0]["run_id"]).is_dir():
        bring_up(folder, top[0]["run_id"])
        return newest(folder)
    return top


def run_rows(folder):
    """(id, state, val ppl, size on disk, last save, settings that differ from the run at the top) of each run, as text.

    Raises:
        UserError: the files at the top cannot be read.
    """
    folder, rows = Path(folder), []
    top = newest(folder)[0]
    runs = [(folder, top)] if top else []
    for home, state in runs + [run for run in parked(folder) if not top or run[0].name != top["run_id"]]:
        size = f"{bytes_of(home) / 1e6:.1f} MB"
        if state is None:
            rows.append((home.name, "cannot be read", "", size, "", ""))
            continue
        head = state["results"].get("phase2", {}).get("head") or (state["stage_state"] or {}).get("best")
        differs = listed(changed(top["config"], state["config"])) if top else ""
        where = "complete" if state["stage"] == "complete" else state["restart"]
        ppl = f"{head['ppl']:.1f}" if head and state["stage"] != "untrained" else ""
        at_top = "at the top" if home == folder else differs
        rows.append((state["run_id"], where, ppl, size, state["saved_at"], at_top))
    return rows


def bytes_of(home):
    """What the files of a run take on disk; several names of one count once."""
    stats = map(os.stat, _files(home))
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())


def remove(folder, run_id):
    """Delete the checkpoints of a run; its record and artefacts stay.

    Returns:
        Bytes that were freed.

    Raises:
        UserError: it is the one at the top, or there is none of this id.
    """
    home = Path(folder) / RUNS / run_id
    if not run_id or home.parent != Path(folder) / RUNS or not home.is_dir():
        raise UserError(
            f"no run {run_id} lies in {home.parent}: the one at the top of {folder} is in use and stays."
        )
    freed = bytes_of(home)
    aside = home.rename(home.with_name(f".{run_id}.removed"))  # whole or gone, also where this is cut off
    shutil.rmtree(aside)
    return freed
