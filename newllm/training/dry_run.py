"""What a run would do, up to its first step: nothing is trained, nothing written but the data's cache."""

from pathlib import Path

from newllm.errors import UserError
from newllm.models.baselines import Baseline
from newllm.report.summary import banner
from newllm.saving.checkpoint import WARNING, require_space
from newllm.saving.files import second_folder, usable_folder
from newllm.saving.guard import holder
from newllm.saving.runs import changed, choose, listed, newest
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
    share = 1 if runtime.device.type == "cpu" else config.gpu_memory_fraction
    memory = share * memory_of(runtime.device) / 1e6
    verdict = "fits" if peak <= memory else "does not fit"
    margin = f"margin {memory - peak:,.0f} MB"
    print(f"memory: predicted peak {peak:,.0f} MB of {memory:,.0f} MB, so the run {verdict}: {margin}")
    if config.save_checkpoint:
        existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
        require_space(existing, model, config, runtime.storage_dtype)
        print(f"disk: the checkpoints of the run fit into {folder}")
    print(f"dry run: nothing was trained, and nothing was written outside of {config.cache_dir}")


def checkpoint_lines(config, fingerprint, folder):
    """What the run would find in its folder, or in the second copies where they are newer; touches nothing.

    Raises:
        UserError: the folder is in use, or damaged as a whole.
    """
    found, where = None, folder
    if folder.is_symlink() or folder.exists():
        usable_folder(folder, "checkpoint_dir")
        if config.save_checkpoint and (in_use := holder(folder)):
            raise UserError(in_use)
        found = newest(folder)[0]
    if config.save_checkpoint and config.backup_dir:
        copies = second_folder(config.backup_dir, folder.resolve(), "backup_dir", make=False)
        second = newest(copies)[0] if copies.is_dir() else None
        if second and (not found or second["save_number"] > found["save_number"]):
            found, where = second, copies
    choice = choose(where, found, config, fingerprint)
    if choice.home is None:
        beside = choice.lines or [f"none in {folder}"]
        return [*(f"checkpoint: {line}" for line in beside), "checkpoint: the run begins from the start"]
    state = newest(choice.home)[0]
    then = "reports once more, as it is complete" if state["stage"] == "complete" else "continues"
    held = f"checkpoint: {choice.home} holds run {state['run_id']}, saved {state['saved_at']}, to go on"
    changes = changed(state["config"], config.to_dict())
    warning = [WARNING + listed(changes)] if changes else []
    return [*choice.lines, f"{held} {state['restart']}, which the run {then}", *warning]
