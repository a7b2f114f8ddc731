"""Every command of README and docs runs as printed, in the order printed, in one checkout whose config.py asks for a tiny size."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_dialogues

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TINY = dict(
    data_source="dialogues.jsonl", tokenizer="bpe", vocab_size=300, max_seq_length=24, val_samples=6, context_dim=8,
    embed_dim=8, num_layers=1, phase1_max_iterations=1, phase2_epochs=1, min_batches=1, precision="fp32",
)  # fmt: skip
SMALLER = {  # what a command says in print: what it says here, where its size or its place is not config.py's
    "--num_samples 781": "--num_samples 12",
    "--num_samples 78 ": "--num_samples 6 ",
    "--ladder": "--ladder 6,12",
    "--kills 20": "--kills 1",
    "--seeds 5 --tokens 6400,100000": "--seeds 1 --arms untrained_frozen,gru --tokens 144,288",
    "--preset seed": "--preset seed --tokenizer bpe --context_dim 8 --embed_dim 8 --num_layers 1",
    "/content/drive/MyDrive/newllm": "../drive",
    "scripts.bench": "scripts.bench --no_switches",
    "scripts.prefill": "scripts.prefill --lengths 100,200",
    "--nproc_per_node 2": "--nproc_per_node 2 --master_port 29617",
}
ELSEWHERE = (  # needs what no test can count on
    "--nproc_per_node gpu", "--multi_gpu",  # a GPU
    "FIRST_MACHINE",  # a second machine
    "accelerate launch --cpu",  # an example of what does not work
    "lm_eval",  # an optional package; tests/test_lm_eval.py
    "pytest",  # this
)  # fmt: skip
STATUS = {"test.py": (0, 1), "doctor": (0, 1)}  # else 0: these say by it what they found


def printed_commands():
    """In order, each once: lines of blocks, and code within a line, that call Python or a launcher."""
    commands = ["python3 train.py"]  # which the quick start ends with
    for page in PAGES:
        text = re.sub(
            r"^## Quick start\n+```\n.*?\n```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL
        )
        found = re.findall(
            r"`((?:python3|torchrun|accelerate launch) [^`\n]+)`|^!?((?:python3|torchrun) .+)",
            text,
            re.MULTILINE,
        )
        commands += [inline or line for inline, line in found]
    return [
        c for c in dict.fromkeys(commands) if not any(word in c for word in ELSEWHERE) and "NAME" not in c
    ]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project, with a tiny config.py and the data that the pages speak of."""
    folder = tmp_path_factory.mktemp("home") / "checkout"
    left_out = shutil.ignore_patterns(
        ".*", "__pycache__", "tests", "cache", "checkpoints", "build", "*.egg-info"
    )
    shutil.copytree(ROOT, folder, ignore=left_out)
    write_dialogues(folder / "dialogues.jsonl", 200)
    text = (folder / "config.py").read_text()
    for name, value in TINY.items():
        text, count = re.subn(rf"^    {name} = \S+", f"    {name} = {value!r}", text, flags=re.MULTILINE)
        assert count == 1, name
    (folder / "config.py").write_text(text)
    (folder.parent / "drive").mkdir()
    return folder


def test_the_pages_have_commands():
    """Else the next test would test nothing."""
    assert len(printed_commands()) >= 25


@pytest.mark.parametrize("command", printed_commands())
def test_command_runs_as_printed(command, checkout):
    """It ends as documented, whatever ran before it, and with nothing that looks like an accident."""
    small = command
    for large, other in SMALLER.items():
        small = small.replace(large, other)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(
        ["bash", "-c", small],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    allowed = next((codes for word, codes in STATUS.items() if word in command), (0,))
    assert done.returncode in allowed, f"{small}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    assert done.stdout.strip()
