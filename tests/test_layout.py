"""The rules of the house: which way imports go, how long a function may be, what the texts may hold."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "newllm").rglob("*.py"))
SOURCES = [
    *PACKAGE,
    *(ROOT / name for name in ("config.py", "train.py", "test.py")),
    *sorted((ROOT / "scripts").glob("*.py")),
]
WIDEST = 110  # columns
SHORTEST = 60  # lines of a module with a single user
LONGEST = 60  # lines of a function, without its docstring, that can still be read at a glance

# A module may import from the package only what stands here (longest matching prefix counts).
MAY_IMPORT = {
    "newllm.saving.stop": set(),
    "newllm.memory": set(),
    "newllm.progress": set(),
    "newllm.clock": set(),
    "newllm.seeding": set(),
    "newllm.versions": set(),
    "newllm.errors": {"newllm.saving.stop", "newllm.memory"},
    "newllm.apart": {"newllm.saving.stop", "newllm.errors"},
    "newllm.saving.files": {"newllm.errors"},
    "newllm.config": {"newllm.errors"},
    "newllm.flags": {"newllm.config", "newllm.errors"},
    "newllm.data": {
        "newllm.data", "newllm.errors", "newllm.saving.files", "newllm.saving.stop", "newllm.seeding",
        "newllm.config", "newllm.progress",
    },
    "newllm.models": {"newllm.models", "newllm.errors"},
    "newllm.models.pretrained": {"newllm.data.hub", "newllm.data.tokens", "newllm.errors"},
    "newllm.fixed_point": {"newllm.fixed_point"},
    "newllm.retrieval": {"newllm.retrieval"},
    "newllm.evaluate": {
        "newllm.fixed_point", "newllm.models", "newllm.saving.stop", "newllm.memory", "newllm.progress",
    },
    "newllm.generate": {"newllm.saving.stop", "newllm.seeding"},
    "newllm.transformers_model": {
        "newllm.models", "newllm.fixed_point", "newllm.retrieval", "newllm.versions",
    },
    "newllm.transformers_export": {
        "newllm.transformers_model", "newllm.saving", "newllm.training", "newllm.report", "newllm.errors",
        "newllm.retrieval", "newllm.versions",
    },
    "newllm.report": {"newllm.report", "newllm.saving.files", "newllm.errors"},
    "newllm.saving": {
        "newllm.saving", "newllm.data", "newllm.models", "newllm.retrieval", "newllm.training.contexts",
        "newllm.errors", "newllm.config", "newllm.clock", "newllm",
    },
    "newllm.phases": {
        "newllm.fixed_point", "newllm.models", "newllm.evaluate", "newllm.seeding",
        "newllm.training.contexts", "newllm.phases.retrieval", "newllm.retrieval", "newllm.saving.stop",
    },
    "newllm.training": {
        "newllm.training", "newllm.saving", "newllm.data", "newllm.models", "newllm.fixed_point",
        "newllm.evaluate", "newllm.report", "newllm.seeding", "newllm.errors", "newllm.memory",
        "newllm.config", "newllm.progress", "newllm.clock", "newllm",
    },
}  # fmt: skip


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = (ROOT / Path(*node.module.split("."), alias.name)).with_suffix(".py").exists()
                yield f"{node.module}.{alias.name}" if inner else node.module


def belongs(name, prefixes):
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes if prefix != "newllm")


@pytest.mark.parametrize("path", PACKAGE, ids=module_name)
def test_imports_go_one_way(path):
    """A module imports only from its layer and those below, a phase not the other; none reads the root."""
    name = module_name(path)
    prefixes = [prefix for prefix in MAY_IMPORT if belongs(name, [prefix])]
    allowed = MAY_IMPORT[max(prefixes, key=len)] if prefixes else ()
    for imported in imports(path):
        top = imported.split(".")[0]
        assert top not in ("config", "train", "test", "scripts"), f"{name} imports {imported}"
        fine = top != "newllm" or imported in allowed or belongs(imported, allowed)
        assert fine, f"{name} must not import {imported}"


def test_a_small_module_has_several_users():
    """One that a single other imports is part of that, unless it is long enough for a subject of its own."""
    users = {}
    for path in SOURCES:
        for name in set(imports(path)):
            users.setdefault(name, []).append(path)
    for path in PACKAGE:
        small = len(path.read_text().splitlines()) < SHORTEST and path.name != "__init__.py"
        assert not small or len(users[module_name(path)]) > 1, f"{path} belongs to its one user"


def test_lines_of_tests_are_short_too():
    """As in what they test."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            assert len(line) <= WIDEST, f"{path}:{number}"


def test_reporting_imports_no_models():
    """Reports are made from plain numbers; they need no torch."""
    for path in (ROOT / "newllm" / "report").glob("*.py"):
        libraries = {name.split(".")[0] for name in imports(path)}
        assert not libraries & {"torch", "transformers", "accelerate"}, path


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_file_is_a_room(path):
    """One subject, said in its first line; ASCII; no history or to-do in the code."""
    text = path.read_text()
    assert text.isascii()
    assert max(map(len, text.splitlines()), default=0) <= WIDEST
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_function_is_read_at_a_glance(path):
    """Files are cut by subject and not by length; what must stay short is a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            length = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
            assert length <= LONGEST, f"{path}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_are_utf8_and_flags_one_sentence(path):
    """Text files name their encoding. Every command has the parser whose errors are sentences."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        given = {word.arg: word.value for word in node.keywords}
        if name in ("open", "fdopen"):
            mode = given.get("mode", (node.args[1:] or [ast.Constant("r")])[0])
            text = isinstance(mode, ast.Constant) and isinstance(mode.value, str) and "b" not in mode.value
        elif name in ("read_text", "write_text"):
            text = isinstance(node.func, ast.Attribute) and len(node.args) < (1 if name == "read_text" else 2)
        else:
            text = name in ("run", "Popen", "check_output") and "text" in given
        assert not text or "encoding" in given, f"{path}:{node.lineno} names no encoding"
        fine = name != "ArgumentParser" or module_name(path) == "newllm.flags"
        assert fine, f"{path}:{node.lineno}: use newllm.flags.Parser"


def test_public_functions_say_what_they_do():
    """Every public function and class of the package has a docstring, except the shortest."""
    for path in PACKAGE:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                short = node.end_lineno - node.lineno <= 4
                assert ast.get_docstring(node) or short, f"{path}: {node.name}"


def test_every_file_is_named_in_the_documents():
    """The list of files is complete, so a stranger finds the room."""
    listed = (ROOT / "docs" / "architecture.md").read_text()
    for path in SOURCES:
        if path.name != "__init__.py":
            assert path.name in listed, f"docs/architecture.md does not mention {path.name}"


def test_links_of_the_documents_lead_somewhere():
    """Pictures and pages that README and docs refer to are there, and every page of docs is referred to."""
    readme = ROOT / "README.md"
    for page in (readme, *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        assert page == readme or f"docs/{page.name}" in readme.read_text()
