"""Whether this machine is ready for a run: one line a check, OK or what to do; exit status 1 if it is not.

    python3 -m scripts.doctor                        # the values of config.py
    python3 -m scripts.doctor --num_samples 781      # every setting is a flag, as in train.py
    python3 -m scripts.doctor --memory               # what that run holds in memory, by stage, and its peak
    python3 -m scripts.doctor --measure              # the same, beside what two rounds of each stage take

Needs no GPU and changes nothing; folders that a run would make are made, and its data is put into its cache.
"""

import contextlib
import dataclasses
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

import train
from config import ResidualConfig
from newllm.apart import call_apart
from newllm.config import DataSettings
from newllm.data import hub
from newllm.data.dialogues import ULTRACHAT, ULTRACHAT_REVISION, open_corpus
from newllm.data.samples import load_data, shared_runs
from newllm.data.tokens import choose_tokenizer, tokenizer_choice
from newllm.errors import UserError, exit_on_user_error
from newllm.flags import parse_args
from newllm.models.pretrained import require_own_ids
from newllm.report.compare import table
from newllm.report.summary import batches, cadence, trainable
from newllm.saving.checkpoint import require_space
from newllm.saving.files import COLAB_DRIVE, usable_folder
from newllm.saving.stop import Interrupt
from newllm.training import memory_estimate
from newllm.training.memory_estimate import sketch, usable_memory, vocabulary
from newllm.training.plan import make_plan, training_samples
from newllm.training.runtime import allocator_setting, describe_device, open_runtime
from newllm.versions import outside

MUCH, MOST = 0.1, 20  # share of a sample's runs of words that is worth naming it; numbers that are listed
MARGIN = 0.9  # share of the memory that a run may be predicted to take
# Saves and best weights lie beside training from the second round on.
ROUNDS = dict(phase1_max_iterations=2, phase2_epochs=2, load_checkpoint=False, artifacts=False, backup_dir="")
INSTALL = "`pip install -q -e .`"


class Note(Exception):
    """Worth knowing, and no reason not to train."""


def check_packages(config):
    try:
        needed = [text for text in importlib.metadata.requires("newllm") if "extra ==" not in text]
        names = [re.match(r"[\w.-]+", text)[0] for text in needed]
        versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    except importlib.metadata.PackageNotFoundError as missing:
        kind = Note if missing.name == "newllm" else UserError  # from its own folder it runs all the same
        raise kind(f"{missing.name} is not installed: run {INSTALL}.") from None
    if wrong := outside(needed):
        raise UserError(f"{'; '.join(wrong)}, the range it was tested with: {INSTALL} again.")
    return f"python {platform.python_version()}, " + ", ".join(versions)


def check_device(config):
    open_runtime(config)  # refuses a device or precision that there is not
    if not torch.cuda.is_available():
        colab = "On Colab: Runtime, Change runtime type, T4 GPU."
        raise Note(f"GPU Available: False; training runs on the CPU. {colab}")
    card = torch.cuda.get_device_properties(0)
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    size = f"Memory: {card.total_memory / 1e9:.2f} GB, capability {card.major}.{card.minor}"
    return f"GPU Available: True, Device: {card.name}, {size}, native bf16: {native}"


def check_in_effect(config):
    runtime = open_runtime(config)
    plan = make_plan(config, training_samples(config), sketch(config, vocabulary(config)), runtime)
    return (
        f"{describe_device(runtime)}; trainable parameters: {trainable(plan)}; batches: {batches(plan)}; "
        f"{cadence(config)}; allocator {allocator_setting() or 'as torch has it'}"
    )


def check_memory(config):
    runtime = open_runtime(config)
    peak = memory_estimate.predicted_peak(config, vocabulary(config), runtime)
    usable = usable_memory(config, runtime)
    said = f"predicted peak {peak:,.0f} MB of {usable:,.0f} MB"
    if peak > MARGIN * usable:
        advice = "take smaller batches, a smaller vocabulary or fewer layers (--memory says what is large)"
        raise UserError(f"{said}: {advice}.")
    return said


def check_folders(config):
    """They can be written; where they are links, what they lead to is there."""
    said = []
    for name in ("cache_dir", "checkpoint_dir"):
        path = Path(getattr(config, name))
        folder = usable_folder(path, name)
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            refused = f"{folder} ({name}) cannot be written ({error.strerror})"
            raise UserError(f"{refused}: choose another folder.") from error
        if (folder / folder.name).is_symlink():
            raise Note(f"{folder / folder.name} is a link that a repeated `ln -s` has made: delete it.")
        said.append(f"{path} is {'a link to ' if path.is_symlink() else ''}{folder}")
    return ", ".join(said)


def check_disk(config):
    folder, runtime = usable_folder(config.checkpoint_dir, "checkpoint_dir"), open_runtime(config)
    require_space(folder, sketch(config, vocabulary(config)), config, runtime.storage_dtype)
    return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free in {folder}"


def check_drive(config):
    """On Colab: that Drive is mounted, and that what a run writes lies on it."""
    if not (importlib.util.find_spec("google") and importlib.util.find_spec("google.colab")):
        return "not on Colab: what a run writes stays on this machine"
    if not os.path.ismount(COLAB_DRIVE):
        raise Note("Drive is not mounted: run the notebook's first cell, or what is written here is lost.")
    here = Path(config.checkpoint_dir).resolve()
    if not (here.is_relative_to(COLAB_DRIVE) or config.backup_dir):
        advice = "run scripts.link_drive, or give --backup_dir."
        raise Note(f"checkpoints go to {here}, which is lost with the machine: {advice}")
    return f"mounted; checkpoints go to {here}"


def check_hub(config):
    try:
        hub.probe(f"api/datasets/{ULTRACHAT}/revision/{ULTRACHAT_REVISION}")
    except hub.Unreachable as reason:
        instead = "data and tokenizer come from the cache or what is embedded"
        raise Note(f"cannot be reached ({reason}); {instead}.") from None
    return "reachable"


def check_data(config):
    corpus = open_corpus(config.data_source, config.data_split, config.data_column)
    next(corpus.train())
    return corpus.note.removeprefix("data: ")


def check_tokenizer(config):
    choice = tokenizer_choice(config)
    require_own_ids(config.embeddings, choice)
    tokenizer, reason = choose_tokenizer(choice)
    if tokenizer:
        return f"{tokenizer.name}, {tokenizer.vocab_size:,} ids"
    trained = f"a byte-level BPE of {config.vocab_size:,} ids, trained on the training dialogues"
    return f"{trained} ({reason})" if reason else trained


def check_overlap(config):
    """That what is predicted was not read: most of all what is looked up would profit."""
    shares = shared_runs(load_data(config.part(DataSettings)))
    many = [number for number, share in enumerate(shares) if share > MUCH]
    said = f"training samples have {sum(shares) / len(shares):.1%} of the 8-word runs of a validation sample"
    said += f"; of {len(many)} of {len(shares)} they have more than {MUCH:.0%}"
    listed = ", ".join(map(str, many[:MOST])) + (", ..." if len(many) > MOST else "")
    return said + (f": those numbered {listed}" if many else "")


CHECKS = (
    check_packages, check_device, check_in_effect, check_memory, check_folders, check_disk, check_drive,
    check_hub, check_data, check_tokenizer, check_overlap,
)  # fmt: skip


def main(config):
    """Make all checks, a line each; whether a run could begin. A second failure of one cause is a note."""
    causes = {}
    for check in CHECKS:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        try:
            verdict, said = "OK", check(config)
        except Note as note:
            verdict, said = "NOTE", note
        except UserError as error:
            verdict, said = "FAIL", error
            first = causes.setdefault(str(error), name)
            if first != name:
                verdict, said = "NOTE", f"not checked, because of {first}"
        print(f"{verdict:4} {name}: {said}", flush=True)
    print("ready to train" if not causes else f"{len(causes)} of {len(CHECKS)} checks failed")
    return not causes


def measure(config):
    """Peak MB of this process after two rounds of each stage."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        return train.main(dataclasses.replace(config, checkpoint_dir=folder, **ROUNDS))["peak_memory_mb"]


def print_memory(config, measuring):
    """What a run holds in each stage, its predicted and measured peak, and whether this machine has it."""
    runtime = open_runtime(config)
    print(f"device: {describe_device(runtime)}; vocabulary {vocabulary(config):,}\n")
    stages = memory_estimate.memory_table(config, vocabulary(config), runtime)
    rows = [(thing, *(f"{held[thing]:,.1f}" for held in stages.values())) for thing in memory_estimate.THINGS]
    sums = [sum(held.values()) for held in stages.values()]
    print("\n".join(table(("MB", *stages), [*rows, ("sum", *(f"{size:,.1f}" for size in sums))])))
    peak = max(sums)
    bound = "a lower bound" if config.compile or runtime.device.type == "cuda" else "give or take 15 %"
    print(f"\npredicted peak ({bound}): {memory_estimate.verdict(peak, usable_memory(config, runtime))}")
    if measuring:
        with Interrupt():
            measured = call_apart(measure, config)
        print(f"measured peak: {measured:,.0f} MB, so the estimate is {peak / measured - 1:+.1%} off")


def flags(parser):
    parser.add_argument("--memory", action="store_true", help="only what a run holds in memory, by stage")
    parser.add_argument("--measure", action="store_true", help="the same, beside what two rounds really take")


if __name__ == "__main__":
    with exit_on_user_error():
        config, arguments = parse_args(ResidualConfig, description=__doc__.splitlines()[0], extra=flags)
        if arguments.memory or arguments.measure:
            print_memory(config, arguments.measure)
        else:
            sys.exit(0 if main(config) else 1)
