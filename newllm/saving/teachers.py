"""The models that teach a run (setting `teachers`): which files they are, and that they stay the same.

A run keeps each as its path and the first digits of the file's SHA-256, `PATH#0123456789ab`, so that another
model at the same path makes another run and never changes the targets of one that has begun.
"""

import dataclasses
import re
from pathlib import Path

from newllm.config import expanded
from newllm.errors import UserError
from newllm.saving.files import verify_seal
from newllm.saving.runs import newest
from newllm.saving.trained import open_model, predicts

DIGITS = 12
NAMED = re.compile(r"(.*)#([0-9a-f]{12})", re.DOTALL)


def named_teachers(config):
    """[(path, digits of its checksum or "")] of the setting, in its order; [] where they have no share."""
    has_share = config.label_smoothing and config.phase == "both"
    named = []
    for name in filter(None, map(str.strip, config.teachers.split(",") if has_share else ())):
        said = NAMED.fullmatch(name)
        path, digits = said.groups() if said else (name, "")
        named.append((Path(expanded(path)), digits))
    return named


def teacher_file(path):
    """The file that a teacher is: of a folder of checkpoints its newest state; else what the path says."""
    return (newest(path)[1] if path.is_dir() else None) or path


def identified(config):
    """The configuration whose `teachers` say what is in each file.

    Raises:
        UserError: a file cannot be read, is another one than the setting says already, or lies where this
            run keeps its own states.
    """
    names = []
    for path, said in named_teachers(config):
        file = teacher_file(path)
        if config.save_checkpoint and file.resolve().parent == Path(config.checkpoint_dir).resolve():
            raise UserError(
                f"teacher {path} lies among the files that this run moves aside: give the .pth file of its "
                "run, or this run another --checkpoint_dir."
            )
        try:
            digits = verify_seal(file)[:DIGITS]
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"teacher {path} cannot be read ({reason}): give a checkpoint, or their folder."
            ) from error
        if said not in ("", digits):
            raise UserError(
                f"teacher {path} is another model now, #{digits} in place of #{said}: restore it."
            )
        names.append(f"{path}#{digits}")
    return dataclasses.replace(config, teachers=",".join(names)) if names else config


def open_teachers(config, fingerprint, device):
    """The models that the setting names, in its order; none where they have no share.

    Args:
        fingerprint: of the run's data.

    Raises:
        UserError: as of `identified` and open_model; one has no trained head, or was made of other data: it
            may have been trained on the run's held-out dialogues.
    """
    models = []
    for path, _ in named_teachers(identified(config)):
        model, _, content = open_model(path, say=lambda line: None)  # it is refused here
        if not predicts(content):
            raise UserError(
                f"teacher {path} has not begun Phase 2, so it predicts nothing: end its run first."
            )
        if content["data_fingerprint"] != fingerprint:
            raise UserError(
                f"teacher {path} was made of other text, samples or ids than this run: train it with the "
                "same data settings."
            )
        models.append(model.to(device))
    return models
