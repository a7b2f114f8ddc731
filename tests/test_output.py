"""Output that is closed, full, unread or in a poor encoding: commands end in a status, runs stay whole."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, as_flags

from newllm.errors import BROKEN_PIPE
from newllm.report.record import find_records, read_record, read_status

FRAME = """import sys
from newllm.errors import UserError, exit_on_user_error
with exit_on_user_error():
    """


def shell(command, **environment):
    """A line of bash; its status is that of the first command of a pipe."""
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHON": sys.executable} | environment
    line = ["bash", "-c", command + "; exit ${PIPESTATUS[0]}"]
    return subprocess.run(
        line, cwd=ROOT, env=os.environ | variables, capture_output=True, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize(
    ("body", "redirection", "status", "errors"),
    [
        ("print('x' * 10**6)", "2>&1 | true", BROKEN_PIPE, b""),
        ("[print('x', flush=True) for _ in range(10**5)]", "| head -3 >/dev/null", BROKEN_PIPE, b""),
        ("print('x')", ">/dev/full", 2, b"error: the output cannot be written (No space left on device)"),
        ("print(sys.stdout.isatty(), sys.stdin.read())", "<&- >&- 2>&-", 0, b""),
        ("raise UserError('so')", ">&-", 2, b"error: so\n"),
        ("raise UserError('so')", "2>&-", 2, b""),
        ("raise OSError(5, 'of the program itself')", "", 1, b"Traceback"),
        ("import torch; torch.empty(10**15)", "", 2, b"error: memory ran out (["),
    ],
)
def test_output_that_cannot_be_written_ends_a_command_quietly(body, redirection, status, errors):
    """Nobody reads: the status that other programs have. Closed: as if read. Full: a sentence; no trace.

    Memory that runs out in any command is a sentence too.
    """
    done = shell(f'$PYTHON -c "$BODY" {redirection}', BODY=FRAME + body)
    assert done.returncode == status and errors in done.stderr and (errors or not done.stderr), done


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
def test_characters_that_the_output_lacks_are_shown_escaped(encoding):
    """Also those of a file's name that is not UTF-8, also in an error."""
    body = "print('\\u6771\\udcff'); raise UserError('\\u6771\\udcff')"
    done = shell('$PYTHON -c "$BODY"', BODY=FRAME + body, PYTHONIOENCODING=encoding)
    shown = "\u6771".encode("utf-8" if encoding[0] == "u" else "ascii", "backslashreplace") + b"\\udcff\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, shown, b"error: " + shown)


def test_a_run_whose_reader_left_and_one_without_output_are_whole(tiny_settings, tmp_path):
    """The first lets go of its folder; the second, all streams closed, brings it to its end.

    Data, cache, checkpoints, second copies and artefacts have names that are no text in the poorest locale.
    """
    name = "\u0434\u0430\u043d\u043d\u044b\u0435" + os.fsdecode(b"\xff")
    data, folder = tmp_path / f"{name}.jsonl", tmp_path / name
    data.write_bytes(Path(tiny_settings["data_source"]).read_bytes())
    changes = dict(data_source=data, cache_dir=folder / "k", checkpoint_dir=folder / "c")
    changes |= dict(backup_dir=folder / "b", artifacts=True, phase1_max_iterations=1, phase2_epochs=1)
    flags = as_flags(tiny_settings | changes)
    command = f"$PYTHON train.py {shlex.join(flags)}"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert shell(f"{command} | head -3 >/dev/null", **locale).returncode == BROKEN_PIPE
    assert shell(f"{command} <&- >&- 2>&-", **locale).returncode == 0
    assert read_status(folder / "c")["state"] == "complete"
    assert read_record(find_records(folder / "c")[0]).warnings == []
    assert list(folder.glob("c/*/outputs/report_*.html")) and list(folder.glob("b/model_latest.pt"))
