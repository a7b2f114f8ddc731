"""A project without folders, and a place on Drive."""

import pytest


@pytest.fixture
def project(tmp_path):
    (tmp_path / "project").mkdir()
    return tmp_path / "project"


@pytest.fixture
def drive(tmp_path):
    """A folder that does not exist yet, in one that does."""
    (tmp_path / "MyDrive").mkdir()
    return tmp_path / "MyDrive" / "newllm"
