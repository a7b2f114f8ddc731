"""The quick start has its two commands, and every Python block of README and docs runs, at a tiny size."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_dialogues

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TEXTS = "\n".join([README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))])
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXTS, re.MULTILINE | re.DOTALL)
TINY = dict(
    context_dim=8, embed_dim=8, num_layers=1, phase1_max_iterations=1, phase2_epochs=1, min_batches=1, vocab_size=300,
    max_seq_length=8, val_samples=4, precision="fp32",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the files the README speaks of."""
    folder = tmp_path_factory.mktemp("readme")
    write_dialogues(folder / "dialogues.jsonl", 800)
    return folder


def execute(arguments, folder, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, **options)


def test_quick_start_has_two_commands_that_do_their_own_setup():
    """One runs the main job, one the tests; each makes its environment and installs the set that the tests passed with."""
    block = re.search(r"^## Quick start\n+```\n(.*?)\n```", README, re.MULTILINE | re.DOTALL)[1].splitlines()
    assert len(block) == 2
    start = "python3 -m venv .venv && . .venv/bin/activate && pip install -q -c constraints.txt -e "
    assert all(line.startswith(start) for line in block)
    assert block[0].endswith("&& python3 train.py") and block[1].endswith("&& python3 -m pytest")


def test_colab_keeps_the_torch_it_has():
    """Its lines install without the exact set, which has a torch of its own; no address that cannot be pasted is in them."""
    block = re.search(r"^```\n(from google.colab.*?)^```", README, re.MULTILINE | re.DOTALL)[1]
    assert "pip install -q -e ." in block and "constraints" not in block and "ADDRESS" not in block


def test_python_blocks_run(folder):
    """In order, in one process, in a folder of their own; only the size is changed."""
    assert len(PYTHON_BLOCKS) >= 2
    settings = TINY | dict(data_source=str(folder / "dialogues.jsonl"), tokenizer="bpe")
    shrink = f"import config\nfor name, value in {settings!r}.items():\n    setattr(config.ResidualConfig, name, value)\n"
    done = execute([sys.executable, "-c", shrink + "\n".join(PYTHON_BLOCKS)], folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("phase2_complete ")
