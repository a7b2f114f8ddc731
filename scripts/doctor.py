"""Whether this machine is ready for a run with these settings: one line a check, OK or what to do; exit status 1 if it is not.

    python3 -m scripts.doctor                        # the values of config.py
    python3 -m scripts.doctor --num_samples 781      # every setting is a flag, as in train.py

Needs no GPU and changes nothing; folders that a run would make are made.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from config import ResidualConfig
from newllm.config import parse_args
from newllm.data import hub
from newllm.data.dialogues import ULTRACHAT, ULTRACHAT_REVISION, open_corpus
from newllm.data.vocabulary import choose_tokenizer, tokenizer_choice
from newllm.errors import UserError, exit_on_user_error
from newllm.models.baselines import Baseline
from newllm.models.pretrained import require_own_ids
from newllm.report.banner import batches, cadence, trainable
from newllm.saving.checkpoint import require_space
from newllm.saving.drive import COLAB_DRIVE
from newllm.saving.files import usable_folder
from newllm.training.effects import unused_lines
from newllm.training.memory_estimate import predicted_peak, sketch, vocabulary
from newllm.training.plan import make_plan
from newllm.training.runtime import allocator_setting, describe_device, memory_of, open_runtime
from newllm.versions import outside

MARGIN = 0.9  # share of the memory that a run may be predicted to take


class Note(Exception):
    """Worth knowing, and no reason not to train."""


def check_packages(config):
    """What newllm needs is installed, in versions that it takes."""
    try:
        needed = importlib.metadata.requires("newllm")
    except importlib.metadata.PackageNotFoundError:
        raise Note(
            "newllm is not installed, so versions are not checked: run `pip install -q -e .` in its folder."
        ) from None
    own = [text for text in needed if "extra ==" not in text]
    found = []
    for name in (re.match(r"[\w.-]+", text)[0] for text in own):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"{name} is not installed: run `pip install -q -e .`.") from None
    if wrong := outside(own):
        raise UserError(f"{'; '.join(wrong)}, the range it was tested with: `pip install -q -e .` again.")
    if wrong := outside(set(needed) - set(own)):
        raise Note(f"{'; '.join(sorted(set(wrong)))}, the range that optional parts were tested with.")
    return f"python {platform.python_version()}, " + ", ".join(found)


def check_device(config):
    """The GPU, if there is one, and whether bf16 is native to it."""
    open_runtime(config)  # refuses a device or precision that there is not
    if not torch.cuda.is_available():
        raise Note(
            "GPU Available: False; training runs on the CPU. On Colab: Runtime, Change runtime type, T4 GPU."
        )
    properties = torch.cuda.get_device_properties(0)
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return (
        f"GPU Available: True, Device: {properties.name}, Memory: {properties.total_memory / 1e9:.2f} GB, capability "
        f"{properties.major}.{properties.minor}, native bf16: {native}"
    )


def check_precision(config):
    """What would be in effect: device, precision, batches, cadence."""
    runtime, model = open_runtime(config), sketch(config, vocabulary(config))
    plan = make_plan(
        config, config.num_samples - round(config.tune_share * config.num_samples), model, runtime.device
    )
    baseline = isinstance(model, Baseline)
    attention = model.attention_in_effect(runtime.device, runtime.storage_dtype) if baseline else None
    return (
        f"{describe_device(runtime)}; attention {attention or 'none'}; trainable parameters: {trainable(plan)}; "
        f"batches: {batches(plan)}; {cadence(config)}; allocator {allocator_setting() or 'as torch has it'}"
    )


def check_settings(config):
    """The settings fit each other, and each that was given has an effect."""
    require_own_ids(config.embeddings, tokenizer_choice(config))
    choice = tokenizer_choice(config)
    on_cpu = open_runtime(config).device.type == "cpu"
    if unused := unused_lines(config, on_cpu, "bpe" if choice in ("auto", "bpe") else choice):
        raise Note("; ".join(line.removeprefix("warning: ") for line in unused))
    return "each that was given has an effect"


def check_memory(config):
    """The predicted peak fits into what the device has."""
    runtime = open_runtime(config)
    cuda = runtime.device.type == "cuda"
    peak = predicted_peak(config, vocabulary(config), runtime)
    total = memory_of(runtime.device) / 1e6 * (config.gpu_memory_fraction if cuda else 1)
    said = f"predicted peak {peak:,.0f} MB of {total:,.0f} MB"
    if peak > MARGIN * total:
        raise UserError(
            f"{said}: take smaller batches, a smaller vocabulary or fewer layers (scripts.estimate_memory says what is large)."
        )
    return said


def check_folders(config):
    """`cache_dir` and `checkpoint_dir` can be written; where they are links, what they lead to is there."""
    said = []
    for name in ("cache_dir", "checkpoint_dir"):
        path = Path(getattr(config, name))
        folder = usable_folder(path, name)
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"newllm")
        except OSError as error:
            raise UserError(
                f"{folder} ({name}) cannot be written ({error.strerror}): choose another folder."
            ) from error
        for nested in (folder / folder.name, folder / path.name):
            if nested.is_symlink():
                raise Note(
                    f"{nested} is a link inside its own folder, as a repeated `ln -s` makes it: delete that link."
                )
        said.append(f"{path} is {'a link to ' if path.is_symlink() else ''}{folder}")
    return ", ".join(said)


def check_disk(config):
    """There is room for the checkpoints of a run."""
    folder, runtime = usable_folder(config.checkpoint_dir, "checkpoint_dir"), open_runtime(config)
    require_space(folder, sketch(config, vocabulary(config)), config, runtime.storage_dtype)
    return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free in {folder}"


def check_drive(config):
    """On Colab: that Drive is mounted, and that what a run writes lies on it."""
    try:
        on_colab = importlib.util.find_spec("google.colab") is not None
    except ModuleNotFoundError:
        on_colab = False
    if not on_colab:
        return "not on Colab: what a run writes stays on this machine"
    if not os.path.ismount(COLAB_DRIVE):
        raise Note(
            "Drive is not mounted: run the notebook's first cell, or what this machine writes is lost with it."
        )
    here = Path(config.checkpoint_dir).resolve()
    if not (here.is_relative_to(COLAB_DRIVE) or config.backup_dir):
        raise Note(
            f"checkpoints go to {here}, which is lost with the machine: run scripts.link_drive, or give --backup_dir."
        )
    return f"mounted; checkpoints go to {here}"


def check_hub(config):
    """The Hugging Face hub answers."""
    try:
        hub.probe(f"api/datasets/{ULTRACHAT}/revision/{ULTRACHAT_REVISION}")
    except hub.Unreachable as reason:
        raise Note(
            f"cannot be reached ({reason}); data and tokenizer come from the cache or what is embedded."
        ) from None
    return "reachable"


def check_data(config):
    """There are dialogues to train on."""
    corpus = open_corpus(config.data_source, config.data_split, config.data_column)
    next(corpus.train())
    return corpus.note.removeprefix("data: ")


def check_tokenizer(config):
    """There is a tokenizer, or there are texts to train one on."""
    tokenizer, reason = choose_tokenizer(tokenizer_choice(config))
    if tokenizer:
        return f"{tokenizer.name}, {tokenizer.vocab_size:,} ids"
    return (
        f"a byte-level BPE of {config.vocab_size:,} ids, trained on the training dialogues"
        + f" ({reason})" * bool(reason)
    )


CHECKS = {
    "packages": check_packages,
    "device": check_device,
    "settings": check_settings,
    "in effect": check_precision,
    "memory": check_memory,
    "folders": check_folders,
    "disk": check_disk,
    "Drive": check_drive,
    "hub": check_hub,
    "data": check_data,
    "tokenizer": check_tokenizer,
}


def main(config):
    """Make all checks, a line each; returns whether a run could begin. What fails for a reason said before is a note."""
    causes = {}
    for name, check in CHECKS.items():
        try:
            verdict, said = "OK", check(config)
        except Note as note:
            verdict, said = "NOTE", note
        except UserError as error:
            verdict, said = "FAIL", error
            if (first := causes.setdefault(str(error), name)) != name:
                verdict, said = "NOTE", f"not checked, because of {first}"
        print(f"{verdict:4} {name}: {said}", flush=True)
    print("ready to train" if not causes else f"{len(causes)} of {len(CHECKS)} checks failed")
    return not causes


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(0 if main(parse_args(ResidualConfig, description=__doc__.splitlines()[0])[0]) else 1)
