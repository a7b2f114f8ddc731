"""Whether a saved run may be continued with the settings and the data of today, and if not, in one sentence why."""

from newllm.config import EARLIER, Config, settings_of
from newllm.saving.state import STAGE_NAMES

FORMAT = 4  # of a checkpoint's content
READABLE = 3, FORMAT  # whose weights this version reads; 3 counts the place inside an epoch in batches

SHAPES = {name: setting.shapes.split() for name, setting in settings_of(Config).items()}
BATCHES = {name for name, setting in settings_of(Config).items() if setting.until_done}
RESTORE = (
    "restore these settings, choose another --checkpoint_dir, or start afresh with --no-load_checkpoint."
)


def shaping(settings, *others):
    """Those of some settings that shape a run's figures (one of an earlier version does), without those of the other marks."""
    return {
        name: value
        for name, value in settings.items()
        if (marks := SHAPES.get(name, ["data"])) and not set(marks) & set(others)
    }


def compare(found, config, fingerprint, reading=False):
    """Compare a saved state with what is asked for now.

    Args:
        found: content of a checkpoint. fingerprint: digest of the data that the settings give.
        reading: the weights are to be used as they are, so the settings of a stage that has only begun count too.

    Returns:
        (verdict, reason): "continue" with None or a warning; "begin" another run beside it; "refuse".
    """
    if found.get("format") != FORMAT:
        return "refuse", (
            f"has format {found.get('format')}, this version continues {FORMAT}: finish that run with the version that wrote it, "
            "move it away, or choose another --checkpoint_dir."
        )
    if not config.load_checkpoint:
        return "begin", "load_checkpoint is off"
    saved = EARLIER | found["config"]
    now = shaping(config.to_dict())
    changed = {name: (saved.get(name), value) for name, value in now.items() if saved.get(name) != value}
    if others := _shaping_any(changed, {"data", "model"}):
        return "refuse", f"is of another run ({_differences(others)}): {RESTORE}"
    if budget := _shaping_any(changed, {"budget"}):
        return "begin", f"another token budget starts its own run ({_differences(budget)})"
    if found["data_fingerprint"] != fingerprint:
        return "refuse", (
            "was trained on other data than the settings give now (the source or its text changed): choose another "
            "--checkpoint_dir, restore the data, or start afresh with --no-load_checkpoint."
        )
    made = _made(found, reading)
    ahead = {"phase1", "phase2"} - made.keys() - ({"phase2"} if config.phase == "1" else set())
    open_still = {name for name in BATCHES if SHAPES[name][-1] in ahead and not reading}
    for stage, name in made.items():
        if others := {
            key: change for key, change in _shaping_any(changed, {stage}).items() if key not in open_still
        }:
            return "refuse", f"holds {name} made with other settings ({_differences(others)}): {RESTORE}"
    if others := _fewer_than_done(found, changed):
        return (
            "refuse",
            f"is further in {STAGE_NAMES[found['stage']]} than these settings go ({_differences(others)}): {RESTORE}",
        )
    warning = f"warning: settings changed since the checkpoint was written: {_differences(changed)}"
    if kept := dict.fromkeys(name for stage, name in made.items() if _shaping_any(changed, {stage})):
        warning += f"; the figures of {' and '.join(kept)} stay those of the old ones"
    return "continue", warning if changed else None


def _made(found, reading):
    """Marks of the stages whose figures a state holds, and how a person calls them; with `reading` of the one in hand too."""
    results, made = found["results"], {}
    if "contexts" in results.get("untrained", {}):
        made["untrained"] = STAGE_NAMES["untrained"]
    if "head" in results.get("untrained", {}):
        made["control"] = STAGE_NAMES["untrained"]
    for stage in ("phase1", "phase2"):
        if results.get(stage):  # a model without contexts passes Phase 1 with none
            made[stage] = STAGE_NAMES[stage]
        elif reading and stage == found["stage"] and found["position"]:
            made[stage] = f"a part of {STAGE_NAMES[stage]}"
    return made


def _fewer_than_done(found, changed):
    """The changed number of iterations or epochs, if the stage in hand has more behind it or has begun one more."""
    at, name = found["position"], "phase1_max_iterations" if found["stage"] == "phase1" else "phase2_epochs"
    done = at["epoch"] + (at["sample"] > 0) if at else 0
    return {name: changed[name]} if name in changed and changed[name][1] < done else {}


def _shaping_any(changed, marks):
    return {name: change for name, change in changed.items() if marks & set(SHAPES[name])}


def _differences(changed):
    return ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())
