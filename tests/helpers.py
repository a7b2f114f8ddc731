"""A small language to write corpora in, settings as flags, a command, and a file that does harm to who unpickles it."""

import hashlib
import io
import json
import os
import random
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
    """A .jsonl file of `count` dialogues from a small bigram-like language: learnable, and different in every line."""
    source = random.Random(seed)
    with open(path, "w") as file:
        for number in range(count):
            word, words = source.choice(WORDS), []
            for _ in range(60):
                word = WORDS[(WORDS.index(word) * 3 + source.choice((1, 1, 1, 2, 7))) % len(WORDS)]
                words.append(word)
            turns = [" ".join(words[:20]) + f" {number}", " ".join(words[20:])]
            messages = [
                {"role": role, "content": text}
                for role, text in zip(("user", "assistant"), turns, strict=True)
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def as_flags(settings):
    """Settings as command line arguments."""
    flags = []
    for name, value in settings.items():
        flags += (
            [f"--{name}" if value else f"--no_{name}"]
            if isinstance(value, bool)
            else [f"--{name}", str(value)]
        )
    return flags


def run(command, settings, *extra):
    """train.py or test.py as a user runs it, offline. Returns the ended process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, command, *as_flags(settings), *extra]
    return subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


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
    """A torch archive whose unpickling would make the folder `harm`; `sealed` with the checksum that belongs to it."""
    buffer = io.BytesIO()
    torch.save({"model_state_dict": Evil(harm)}, buffer)
    path.write_bytes(seal(buffer.getvalue()) if sealed else buffer.getvalue())


def seal(archive):
    """Bytes of an archive with empty comment -> the same with a correct seal."""
    digest = hashlib.sha256(archive).hexdigest().encode()
    assert archive.endswith(b"\0\0")
    return archive[:-2] + bytes([71, 0]) + b"sha256:" + digest
