"""What a run would do, up to its first step: nothing is trained, and nothing is written but the data's cache."""

import os
from pathlib import Path

from newllm.errors import UserError
from newllm.models.baselines import Baseline
from newllm.report.summary import banner
from newllm.saving.checkpoint_files import CheckpointFiles, newest
from newllm.saving.compatibility import compare
from newllm.saving.files import second_folder, usable_folder
from newllm.saving.guard import holder
from newllm.saving.state import require_space
from newllm.training.effects import unused_lines
from newllm.training.plan import make_plan
from newllm.training.runtime import describe_device, memory_of


def preview(config, runtime, data, model, peak):
    """Say what is in effect, whether memory and disk suffice, and what would be continued.

    Args:
        peak: predicted MB.

    Raises:
        UserError: what a run would be refused for.
    """
    folder = Path(config.checkpoint_dir)
    found = checkpoint_lines(config, data.fingerprint, folder)
    kernel = (
        model.attention_in_effect(runtime.device, runtime.storage_dtype)
        if isinstance(model, Baseline)
        else None
    )
    device, plan = describe_device(runtime), make_plan(config, len(data.train), model, runtime.device)
    notes = [f"attention: {kernel or 'none'}", *found]
    unused = unused_lines(config, runtime.device.type == "cpu", data.tokenizer.name)
    print(*banner(config, device, data, model, plan, notes), *unused, sep="\n")
    memory = (
        memory_of(runtime.device) / 1e6 * (1 if runtime.device.type == "cpu" else config.gpu_memory_fraction)
    )
    verdict = "fits" if peak <= memory else "does not fit"
    margin = f"margin {memory - peak:,.0f} MB"
    print(f"memory: predicted peak {peak:,.0f} MB of {memory:,.0f} MB, so the run {verdict}: {margin}")
    if config.save_checkpoint:
        existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
        require_space(existing, model, config, runtime.storage_dtype)
        print(f"disk: the checkpoints of the run fit into {folder}")
    if not found:
        print(f"checkpoint: none in {folder}, so the run begins from the start")
    print(f"dry run: nothing was trained, and nothing was written outside of {config.cache_dir}")


def checkpoint_lines(config, fingerprint, folder):
    """What the run would find in its folder, or in the second copies where they are newer; touches nothing.

    Raises:
        UserError: the folder is in use, damaged as a whole, or of another run.
    """
    exists, found, where = os.path.lexists(folder), None, folder
    if exists:
        usable_folder(folder, "checkpoint_dir")
        if config.save_checkpoint and (in_use := holder(folder)):
            raise UserError(in_use)
        found = newest(CheckpointFiles(folder, config.keep_last))
    if config.save_checkpoint and config.backup_dir:
        copies = second_folder(config.backup_dir, folder.resolve(), "backup_dir", make=False)
        second = newest(CheckpointFiles(copies, 0)) if copies.is_dir() else None
        if second and found and second["run_id"] != found["run_id"]:
            if not list(
                folder.glob(f"model_latest_{second['run_id']}.pt*")
            ):  # this folder's earlier run, kept in it
                raise UserError(f"{copies} holds second copies of another run: choose another --backup_dir.")
        elif second and (not found or second["save_number"] > found["save_number"]):
            found, where = second, copies
    if found is None:
        if exists and any(path.exists() for path in CheckpointFiles(folder, config.keep_last).states()):
            raise UserError(
                f"no checkpoint in {folder} can be read: put a whole copy in its place, or move the files away."
            )
        return []
    verdict, reason = compare(found, config, fingerprint)
    if verdict == "refuse":
        raise UserError(f"{Path(where) / 'model_latest.pt'} {reason}")
    continued = f"checkpoint: {where} holds run {found['run_id']}, saved {found['saved_at']}, to go on {found['restart']}"
    if verdict == "begin":
        return [f"{continued}, which is not continued but kept beside: {reason}"]
    complete = found["stage"] == "complete"
    return [
        f"{continued}, which the run {'reports once more, as it is complete' if complete else 'continues'}",
        *[reason] * bool(reason),
    ]
