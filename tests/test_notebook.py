"""The Colab notebook runs from top to bottom at a tiny size, with a stand-in for Colab and without, and is stored stripped."""

import json
import re
import shutil
import stat
import zipfile
from pathlib import Path

import pytest
from helpers import write_dialogues

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "colab.ipynb"
TINY = dict(
    tokenizer='"bpe"', context_dim=8, embed_dim=8, num_layers=1, phase1_max_iterations=1, phase2_epochs=1, min_batches=1,
    vocab_size=300, max_seq_length=24, val_samples=6, precision='"fp32"',
)  # fmt: skip
COLAB = """
def mount(path): import pathlib; (pathlib.Path({drive!r}) / "MyDrive").mkdir(parents=True, exist_ok=True); print("mounted", path)
""", """
def download(name): import pathlib; pathlib.Path({drive!r}, "downloaded").write_bytes(pathlib.Path(name).read_bytes())
"""  # fmt: skip


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
    """No training code in it: every command is one of the project's."""
    pages = "\n".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    commands = re.findall(r"^ *!(.*)", "\n".join(cells("code")), re.MULTILINE)
    assert len(commands) >= 10
    for command in commands:
        name = re.match(r"python3 (?:-m )?(\S+)", command)
        assert (name and name[1] in pages) or command.startswith(("pip install -q -e .", "git clone")), (
            command
        )
    assert not re.search(r"\bimport (torch|newllm|train)\b|torch", "\n".join(cells("code")))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A folder with nothing but commands: git brings a tiny version of the project, pip is content."""
    project, commands = tmp_path / "project", tmp_path / "bin"
    shutil.copytree(
        ROOT,
        project,
        ignore=shutil.ignore_patterns(".*", "tests", "results", "cache", "checkpoints", "*.egg-info"),
    )
    write_dialogues(project / "dialogues.jsonl", 60)
    text = (project / "config.py").read_text()
    for name, value in (TINY | {"data_source": '"dialogues.jsonl"'}).items():
        text = re.sub(rf"^    {name} = \S+", f"    {name} = {value}", text, flags=re.MULTILINE)
    (project / "config.py").write_text(text)
    commands.mkdir()
    for name, line in (
        ("git", f'cp -r {project} "${{@: -1}}"'),
        ("pip", f'echo "$@" >> {tmp_path}/installed'),
    ):
        path = commands / name
        path.write_text(f"#!/bin/bash\n{line}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{commands}:{Path(shutil.which('python3')).parent}:/usr/bin:/bin")
    for name, value in (
        ("OMP_NUM_THREADS", "1"),
        ("HF_HUB_OFFLINE", "1"),
        ("PYDEVD_DISABLE_FILE_VALIDATION", "1"),
    ):
        monkeypatch.setenv(name, value)
    (tmp_path / "home").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "on_colab", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["colab", "elsewhere"]
)
def test_it_runs_from_top_to_bottom(machine, monkeypatch, on_colab):
    """Cloned, installed, checked, trained, shown, compared, generated and exported; on Colab what it writes lies on Drive."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    home, drive = machine / "home", machine / "drive"
    if on_colab:
        package = machine / "stand_in" / "google" / "colab"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        for name, source in zip(("drive", "files"), COLAB, strict=True):
            (package / f"{name}.py").write_text(source.format(drive=str(drive)))
        monkeypatch.setenv("PYTHONPATH", str(machine / "stand_in"))
    text = NOTEBOOK.read_text().replace("/content/drive/MyDrive", str(drive / "MyDrive"))
    for large, small in (("--num_samples 781", "--num_samples 12"), ("--num_samples 78", "--num_samples 6"),
                         ("--tokens 6400", "--tokens 144"), ('REPOSITORY = \\"\\"', 'REPOSITORY = \\"an address\\"')):  # fmt: skip
        assert large in text
        text = text.replace(large, small)
    notebook = nbformat.reads(text, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(home)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    said = "\n".join(printed)
    assert not re.search(r"Traceback|^error:", said, re.MULTILINE), said
    assert (machine / "installed").read_text() == "install -q -e .\n"
    for sign in (
        "ready to train",
        "criterion",
        "Phase: ",
        "SPEED ANALYSIS",
        "| phase1_frozen |",
        "User: How do I boil",
    ):
        assert sign in said, f"{sign}:\n{said}"
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    export = home / "newllm" / "newllm_run.zip"
    assert export.stat().st_size > 10_000
    assert (home / "newllm" / "checkpoints").is_symlink() == on_colab
    if on_colab:
        assert (drive / "downloaded").read_bytes() == export.read_bytes()
        assert (drive / "MyDrive" / "newllm" / "checkpoints" / "model_latest.pt").exists()


def test_it_says_first_where_the_code_comes_from():
    """The first cell names the three places, the second is the one variable."""
    notebook = json.loads(NOTEBOOK.read_text())
    first, second = ("".join(cell["source"]) for cell in notebook["cells"][:2])
    assert "`REPOSITORY`" in first and "`newllm.zip`" in first and second.startswith('REPOSITORY = ""')
    assert "REPOSITORY = " not in "\n".join(cells("code")[1:])


@pytest.mark.parametrize(
    "way", ["zip", "zip with a folder", "zip on Drive", "here", "nothing", "wrong address"]
)
def test_the_code_is_had_from_what_is_there(machine, way):
    """A zip beside the notebook or on Drive, its top folder or not; the folder itself; else one sentence on what to do."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    home, drive = machine / "home", machine / "drive" / "MyDrive"
    if way.startswith("zip"):
        drive.mkdir(parents=True)
        with zipfile.ZipFile((drive if "Drive" in way else home) / "newllm.zip", "w") as archive:
            for path in (machine / "project").rglob("*.py"):
                archive.write(
                    path,
                    Path("newllm-main" if "folder" in way else "", path.relative_to(machine / "project")),
                )
    if way == "wrong address":
        (machine / "bin" / "git").write_text("#!/bin/bash\necho fatal: not found >&2; exit 128\n")
    text = NOTEBOOK.read_text().replace("/content/drive/MyDrive", str(drive))
    if way == "wrong address":
        text = text.replace('REPOSITORY = \\"\\"', 'REPOSITORY = \\"an address\\"')
    notebook = nbformat.reads(text, as_version=4)
    last = next(i for i, cell in enumerate(notebook.cells) if "pip install" in cell.source)
    notebook.cells = [*notebook.cells[: last + 1], nbformat.v4.new_code_cell("print(pathlib.Path.cwd())")]
    where = machine / "project" / "notebooks" if way == "here" else home
    client = nbclient.NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(where)}})
    if way in ("nothing", "wrong address"):
        with pytest.raises(nbclient.exceptions.CellExecutionError) as error:
            client.execute()
        says = (
            "There is no project here: fill in REPOSITORY"
            if way == "nothing"
            else "'an address', brought no project"
        )
        assert says in str(error.value) and not (machine / "installed").exists()
        return
    client.execute()
    expected = {"here": machine / "project", "zip with a folder": home / "newllm" / "newllm-main"}.get(
        way, home / "newllm"
    )
    assert notebook.cells[-1].outputs[-1].text.strip() == str(expected)
    assert (machine / "installed").read_text() == "install -q -e .\n"
