"""The Colab notebook at a tiny size, from top to bottom with a stand-in for Colab; it is stored stripped."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, tiny_checkout

NOTEBOOK = ROOT / "notebooks" / "colab.ipynb"
COLAB = {
    "drive": 'import pathlib\ndef mount(path): (pathlib.Path({drive!r}) / "MyDrive").mkdir(parents=True)',
    "files": 'import shutil\ndef download(name): shutil.copy(name, {drive!r} + "/downloaded")',
}
SMALLER = {
    "--num_samples 781": "--num_samples 12",
    "--num_samples 78\n": "--num_samples 6\n",
    "--arms untrained_frozen,phase1_frozen,end_to_end,gru": "--arms phase1_frozen,gru",
    "--tokens 6400": "--tokens 144",
}


def cells(kind):
    notebook = json.loads(NOTEBOOK.read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_it_is_stored_without_outputs():
    """Outputs and widget state would be somebody's machine in the history."""
    notebook = json.loads(NOTEBOOK.read_text())
    assert "widgets" not in notebook["metadata"] and NOTEBOOK.read_text().isascii()
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None and cell["metadata"] == {}


def test_it_only_calls_what_the_documents_name():
    """No training code in it: every command is the project's. Its first cells say where that comes from."""
    pages = "\n".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    code = "\n".join(cells("code"))
    commands = re.findall(r"^ *!(.*)", code, re.MULTILINE)
    assert len(commands) >= 10
    for command in commands:
        name = re.match(r"python3 (?:-m )?(\S+)", command)
        known = name and name[1] in pages
        assert known or command.startswith(("pip install -q -e .", "git clone")), command
    assert not re.search(r"\bimport (torch|newllm|train)\b|torch", code)
    first, second = cells("markdown")[0], cells("code")[0]
    assert "`REPOSITORY`" in first and "`newllm.zip`" in first
    assert second.startswith('REPOSITORY = ""') and code.count("REPOSITORY = ") == 1


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A folder with nothing but commands: git brings a tiny version of the project, pip is content."""
    project, commands = tiny_checkout(tmp_path / "project"), tmp_path / "bin"
    commands.mkdir()
    (tmp_path / "home").mkdir()
    for name, line in {
        "git": f'cp -r {project} "${{@: -1}}"',
        "pip": f'echo "$@" >> {tmp_path}/installed',
    }.items():
        (commands / name).write_text(f"#!/bin/bash\n{line}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{Path(shutil.which('python3')).parent}:/usr/bin:/bin")
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "PYDEVD_DISABLE_FILE_VALIDATION"):
        monkeypatch.setenv(name, "1")
    return tmp_path


def test_it_runs_from_top_to_bottom_on_colab(machine, monkeypatch):
    """Cloned, installed, checked, trained, shown, compared, exported; what it writes is on Drive."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    home, drive = machine / "home", machine / "drive"
    package = machine / "stand_in" / "google" / "colab"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name, source in COLAB.items():
        (package / f"{name}.py").write_text(source.format(drive=str(drive)))
    monkeypatch.setenv("PYTHONPATH", str(machine / "stand_in"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("/content/drive/MyDrive", str(drive / "MyDrive"))
        cell.source = cell.source.replace('REPOSITORY = ""', 'REPOSITORY = "an address"')
        for large, small in SMALLER.items():
            cell.source = (cell.source + "\n").replace(large, small).rstrip()
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(home)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = "\n".join(output.get("text", "") for output in outputs)
    assert not re.search(r"Traceback|^error:", said, re.MULTILINE), said
    assert (machine / "installed").read_text() == "install -q -e .\n"
    signs = (
        "ready to train",
        "criterion",
        "Phase: ",
        "SPEED ANALYSIS",
        "| phase1_frozen |",
        "User: How do I boil",
    )
    for sign in signs:
        assert sign in said, f"{sign}:\n{said}"
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert (drive / "downloaded").stat().st_size > 10_000
    assert (home / "newllm" / "checkpoints").is_symlink()
    assert (drive / "MyDrive" / "newllm" / "checkpoints" / "model_latest.pt").exists()


@pytest.mark.parametrize(
    "way", ["zip", "zip with a folder", "zip on Drive", "here", "nothing", "wrong address"]
)
def test_without_colab_the_code_is_had_from_what_is_there(machine, way):
    """A zip beside it or on Drive, its top folder or not; the folder itself; else one sentence."""
    pytest.importorskip("IPython")
    home, drive, project = machine / "home", machine / "MyDrive", machine / "project"
    drive.mkdir()
    if way.startswith("zip"):
        with zipfile.ZipFile((drive if "Drive" in way else home) / "newllm.zip", "w") as archive:
            for path in project.rglob("*.py"):
                archive.write(path, Path("newllm-main" if "folder" in way else "", path.relative_to(project)))
    code = "\n".join(cells("code")[:3]).replace("/content/drive/MyDrive", str(drive))
    if way == "wrong address":
        code = code.replace('REPOSITORY = ""', 'REPOSITORY = "an address"')
        (machine / "bin" / "git").write_text("#!/bin/bash\necho fatal: not found >&2; exit 128\n")
    (machine / "cells.ipy").write_text(f"{code}\nprint(pathlib.Path.cwd())\n")
    command = [sys.executable, "-m", "IPython", "--quick", "--colors=NoColor", machine / "cells.ipy"]
    where = project / "notebooks" if way == "here" else home
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    refused = {
        "nothing": "There is no project here: fill in REPOSITORY",
        "wrong address": "'an address', brought no project",
    }
    if way in refused:
        assert done.returncode and refused[way] in done.stdout and not (machine / "installed").exists()
        return
    places = {"here": project, "zip with a folder": home / "newllm" / "newllm-main"}
    assert done.stdout.strip() == str(places.get(way, home / "newllm")), done.stderr
    assert (machine / "installed").read_text() == "install -q -e .\n"
