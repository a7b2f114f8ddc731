"""A small language to write corpora in, settings as flags, commands, a file that harms who unpickles it."""

import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from newllm.saving.stop import Interrupt, Stopped

ROOT = Path(__file__).parent.parent
WORDS = [f"{first}{last}" for first in ("ba", "do", "ki", "lu") for last in ("n", "r", "st", "ve", "m")]


def write_dialogues(path, count, seed=0):
    """A .jsonl file of `count` dialogues in a small bigram-like language: learnable, each line different."""
    source = random.Random(seed)
    with open(path, "w") as file:
        for number in range(count):
            word, words = source.choice(WORDS), []
            for _ in range(60):
                word = WORDS[(WORDS.index(word) * 3 + source.choice((1, 1, 1, 2, 7))) % len(WORDS)]
                words.append(word)
            turns = [" ".join(words[:20]) + f" {number}", " ".join(words[20:])]
            roles = ("user", "assistant")
            messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


TINY_FILE = dict(
    data_source="dialogues.jsonl", tokenizer="bpe", vocab_size=300, max_seq_length=24, val_samples=6,
    context_dim=8, embed_dim=8, num_layers=1, phase1_max_iterations=1, phase2_epochs=1, min_batches=1,
    precision="fp32", retrieval="none",
)  # fmt: skip


def tiny_checkout(folder):
    """A copy of the project with a tiny config.py and data of its own, as commands and notebook use it."""
    left_out = shutil.ignore_patterns(
        ".*", "__pycache__", "tests", "cache", "checkpoints", "build", "*.egg-info"
    )
    shutil.copytree(ROOT, folder, ignore=left_out)
    write_dialogues(folder / "dialogues.jsonl", 200)
    text = (folder / "config.py").read_text()
    for name, value in TINY_FILE.items():
        text, count = re.subn(rf"^    {name} = \S+", f"    {name} = {value!r}", text, flags=re.MULTILINE)
        assert count == 1, name
    (folder / "config.py").write_text(text)
    return folder


def tiny(data, folder):
    """Settings of a run that takes about a second, all of whose files lie in a folder."""
    return dict(
        data_source=str(data), tokenizer="bpe", vocab_size=300, num_samples=12, val_samples=6,
        max_seq_length=24, context_dim=16, embed_dim=16, num_layers=1, phase1_max_iterations=3,
        phase1_batch_size=4, phase2_epochs=3, phase2_batch_size=4, min_batches=3, precision="fp32",
        device="cpu", cache_dir=str(folder / "cache"), checkpoint_dir=str(folder / "checkpoints"),
    )  # fmt: skip


def as_flags(settings):
    """Settings as command line arguments."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        else:
            flags += [f"--{name}", str(value)]
    return flags


def run(command, settings, *extra):
    """train.py or test.py as a user runs it, offline. Returns the ended process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, command, *as_flags(settings), *extra]
    options = dict(cwd=ROOT, env=environment, stdin=subprocess.DEVNULL)
    return subprocess.run(arguments, capture_output=True, text=True, **options)


def stop_after(config, batches):
    """Run until so many batches of this session are done, and stop there in good order, with a checkpoint."""
    import train  # here: most tests need none of it
    from newllm.saving.checkpoint import Checkpointer

    asked, real = [], Checkpointer.due

    def due(self, steps):
        asked.append(steps)
        if len(asked) == batches:
            Interrupt.current.signal = signal.SIGTERM
        return real(self, steps)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Checkpointer, "due", due)
        train.main(config)


class Evil:
    """Unpickles by creating a folder."""

    def __init__(self, harm):
        self.harm = str(harm)

    def __reduce__(self):
        return os.mkdir, (self.harm,)


def write_evil(path, harm, sealed=True):
    """A torch archive whose unpickling would make the folder `harm`; `sealed` with its right checksum."""
    buffer = io.BytesIO()
    torch.save({"model_state_dict": Evil(harm)}, buffer)
    path.write_bytes(seal(buffer.getvalue()) if sealed else buffer.getvalue())


def seal(archive):
    """Bytes of an archive with empty comment -> the same with a correct seal."""
    digest = hashlib.sha256(archive).hexdigest().encode()
    assert archive.endswith(b"\0\0")
    return archive[:-2] + bytes([71, 0]) + b"sha256:" + digest
