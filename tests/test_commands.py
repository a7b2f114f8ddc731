"""README and docs as a newcomer uses them: each command as printed, in order, in one checkout and one folder of runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_dialogues

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
TINY = dict(
    data_source="dialogues.jsonl", tokenizer="bpe", vocab_size=300, max_seq_length=24, val_samples=6, context_dim=8,
    embed_dim=8, num_layers=1, phase1_max_iterations=1, phase2_epochs=1, min_batches=1, precision="fp32",
)  # fmt: skip
SMALLER = {  # what a command says in print: what it says here, where its size or its place is not config.py's
    "--num_samples 781": "--num_samples 12",
    "--num_samples 78 ": "--num_samples 6 ",
    "--ladder": "--ladder 6,12",
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


def execute(command, folder):
    """Run it as in a terminal of somebody who has no hub, one thread, and no GPU."""
    places = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        "PATH": places,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    options = dict(capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL, timeout=300)
    return subprocess.run(command, cwd=folder, env=os.environ | environment, **options)


def test_the_pages_have_commands():
    """Else the next test would test nothing."""
    assert len(printed_commands()) >= 25


@pytest.mark.parametrize("command", printed_commands())
def test_command_runs_as_printed(command, checkout):
    """It ends as documented, whatever ran before it, and with nothing that looks like an accident."""
    small = command
    for large, other in SMALLER.items():
        small = small.replace(large, other)
    done = execute(["bash", "-c", small], checkout)
    allowed = next((codes for word, codes in STATUS.items() if word in command), (0,))
    assert done.returncode in allowed, f"{small}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    assert done.stdout.strip()


def test_quick_start_has_two_commands_that_do_their_own_setup():
    """One runs the main job, one the tests; each makes its environment and installs the tested set of versions."""
    block = re.search(r"^## Quick start\n+```\n(.*?)\n```", README.read_text(), re.MULTILINE | re.DOTALL)[1]
    train, test = block.splitlines()
    start = "python3 -m venv .venv && . .venv/bin/activate && pip install -q -c constraints.txt -e "
    assert train.startswith(start) and train.endswith("&& python3 train.py")
    assert test.startswith(start) and test.endswith("&& python3 -m pytest")


def test_colab_keeps_the_torch_it_has():
    """Its lines install without the exact set, which has a torch of its own, and can be pasted as they are."""
    pages = "\n".join(page.read_text() for page in PAGES)
    block = re.search(r"^```\n(from google.colab.*?)^```", pages, re.MULTILINE | re.DOTALL)[1]
    assert "pip install -q -e ." in block and "constraints" not in block and "ADDRESS" not in block


def test_python_blocks_run(checkout):
    """In order, in one process, in the folder in which the commands ran."""
    blocks = PYTHON_BLOCK.findall("\n".join(page.read_text() for page in PAGES))
    assert len(blocks) >= 2
    done = execute([sys.executable, "-c", "\n".join(blocks)], checkout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("phase2_complete ")
