"""Dependencies have a floor and a ceiling, imports are declared, constraints.txt is one exact set."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = list(map(Requirement, PROJECT["dependencies"]))
EVERY = NEEDED + [Requirement(text) for texts in PROJECT["optional-dependencies"].values() for text in texts]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PINNED = {canonicalize_name(pinned.name): pinned for pinned in map(Requirement, LINES)}


@pytest.mark.parametrize("needed", EVERY, ids=str)
def test_a_dependency_has_a_floor_and_ends_at_its_next_major_version(needed):
    """Or is one exact version; the one in constraints.txt lies in the range."""
    bounds = {bound.operator: Version(bound.version) for bound in needed.specifier}
    if needed.name != "lm_eval":  # not among what the tests install
        [exact] = PINNED[canonicalize_name(needed.name)].specifier
        assert needed.specifier.contains(exact.version)
        if set(bounds) != {"=="} and needed.name != "torch":  # whose minor versions change figures
            assert bounds["<"] == Version(str(Version(exact.version).major + 1))
    assert set(bounds) in ({"=="}, {">=", "<"})


def test_the_exact_set_is_exact():
    """One version each, without a local tag such as +cpu, which other machines do not have."""
    assert len(PINNED) == len(LINES)
    for pinned in PINNED.values():
        [exact] = pinned.specifier
        assert exact.operator == "==" and "+" not in exact.version and "*" not in exact.version


def test_every_package_that_is_imported_is_a_dependency_and_every_dependency_is_imported():
    """Directly, in newllm, scripts or the root's files; chitchat-dataset is read, not imported."""
    sources = [*ROOT.glob("*.py"), *(ROOT / "newllm").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    imported = set()
    for node in (node for path in sources for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    own = {path.stem for path in ROOT.glob("*.py")} | {"newllm", "scripts"}
    known = {re.split(r"[-.]", needed.name)[0] for needed in EVERY}
    assert imported - set(sys.stdlib_module_names) - own <= known
    assert {needed.name for needed in NEEDED} - imported == {"chitchat-dataset"}


def test_the_python_that_runs_this_is_admitted():
    admitted = SpecifierSet(PROJECT["requires-python"])
    assert admitted.contains(".".join(map(str, sys.version_info[:3])))
