"""README and docs as a newcomer uses them: each command as printed, in order, in one checkout."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, tiny_checkout

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
SMALLER = {  # what a command says in print: what it says here, where its size or its place is not config.py's
    "--num_samples 781": "--num_samples 12",
    "--num_samples 78 ": "--num_samples 6 ",
    "--ladder": "--ladder 6,12",
    "--seeds 5 --tokens 6400,100000": "--seeds 1 --arms gru --tokens 144,288",
    "--preset seed": "--preset seed --tokenizer bpe --context_dim 8 --embed_dim 8 --num_layers 1",
    "/content/drive/MyDrive/newllm": "../drive",
    "scripts.bench": "scripts.bench --no_switches",
    "scripts.bench_retrieval": "scripts.bench_retrieval --parts evaluation --retrieval cache",
    "scripts.prefill": "scripts.prefill --lengths 100,200",
    "--nproc_per_node 2": "--nproc_per_node 2 --master_port 29617",
}
ELSEWHERE = (  # needs what no test can count on
    "--nproc_per_node gpu", "--multi_gpu",  # a GPU
    "FIRST_MACHINE",  # a second machine
    "accelerate launch --cpu",  # an example of what does not work
    "lm_eval",  # an optional package; tests/test_lm_eval.py
    "pytest",  # this
    "NAME",  # any of them
)  # fmt: skip
STATUS = {"test.py": (0, 1), "doctor": (0, 1)}  # else 0: these say by it what they found
# A fresh Python that has imported the libraries already, which takes most of a small command's time: it
# forks for each command `[arguments, file for the output]` that it reads, and writes the exit status.
PYTHON = """
import json, os, runpy, sys
import accelerate, datasets, matplotlib.pyplot, torch, transformers
for line in sys.stdin:
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    arguments, output = json.loads(line)
    for stream, path in enumerate((os.devnull, output, output)):
        os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), stream)
    sys.stdin, sys.argv, sys.path[0] = open(0), arguments, os.getcwd()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()
"""


def printed_commands():
    """In order, each once: lines of blocks, and code within a line, that call Python or a launcher."""
    commands = ["python3 train.py"]  # which the quick start ends with
    for page in PAGES:
        text = re.sub(
            r"^## Quick start\n+```\n.*?\n```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL
        )
        pattern = r"`((?:python3|torchrun|accelerate launch) [^`\n]+)`|^!?((?:python3|torchrun) .+)"
        commands += [inline or line for inline, line in re.findall(pattern, text, re.MULTILINE)]
    return [line for line in dict.fromkeys(commands) if not any(word in line for word in ELSEWHERE)]


@pytest.fixture(scope="module")
def execute(tmp_path_factory):
    """Function: a line, as in the terminal of somebody without hub and GPU -> (exit status, output).

    All in a copy of the project, with a tiny config.py and the data that the pages speak of.
    """
    folder = tiny_checkout(tmp_path_factory.mktemp("home") / "checkout")
    (folder.parent / "drive").mkdir()
    output = folder.parent / "output"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    options = dict(cwd=folder, env=environment, text=True, encoding="utf-8")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", PYTHON], **options, **pipes) as python:

        def execute(line):
            output.write_text("")
            program, *arguments = shlex.split(line)
            if program == "python3" and "&&" not in arguments:
                python.stdin.write(json.dumps([arguments, str(output)]) + "\n")
                python.stdin.flush()
                status = int(python.stdout.readline())
            else:
                with output.open("w") as file:
                    command, null = ["bash", "-c", line], subprocess.DEVNULL
                    status = subprocess.call(command, stdin=null, stdout=file, stderr=file, **options)
            return status, output.read_text(encoding="utf-8")

        yield execute


@pytest.mark.parametrize("command", printed_commands())
def test_command_runs_as_printed(command, execute):
    """It ends as documented, whatever ran before it, and with nothing that looks like an accident."""
    small = command
    for large, other in SMALLER.items():
        small = re.sub(re.escape(large) + r"(?!\w)", other, small)
    status, output = execute(small)
    allowed = next((codes for word, codes in STATUS.items() if word in command), (0,))
    assert status in allowed and output.strip() and "Traceback" not in output, f"{small}\n{output[-4000:]}"


def test_python_blocks_run(execute):
    """In order, in one process, in the folder in which the commands ran."""
    blocks = re.findall(
        r"^```python\n(.*?)^```", "\n".join(map(Path.read_text, PAGES)), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) >= 2 and len(printed_commands()) >= 25
    status, output = execute(f"true && python3 -c {shlex.quote(''.join(blocks))}")  # by a shell
    assert status == 0 and output.splitlines()[-1].startswith("phase2_complete "), output


def test_quick_start_has_two_commands_that_do_their_own_setup():
    """One runs the main job, one the tests; each makes its environment, of the tested set of versions."""
    block = re.search(r"^## Quick start\n+```\n(.*?)\n```", README.read_text(), re.MULTILINE | re.DOTALL)[1]
    train, test = block.splitlines()
    start = "python3 -m venv .venv && . .venv/bin/activate && pip install -q -c constraints.txt -e "
    assert train.startswith(start) and train.endswith("&& python3 train.py")
    assert test.startswith(start) and test.endswith("&& python3 -m pytest")


def test_colab_keeps_the_torch_it_has():
    """Its lines install without the exact set, which has a torch of its own, and can be pasted."""
    pages = "\n".join(page.read_text() for page in PAGES)
    block = re.search(r"^```\n(from google.colab.*?)^```", pages, re.MULTILINE | re.DOTALL)[1]
    assert "pip install -q -e ." in block and "constraints" not in block and "ADDRESS" not in block
