"""Settings of a run of a second or two, and what the report prints."""

import pytest
from helpers import tiny

from scripts import report


@pytest.fixture(scope="module")
def settings(tmp_path_factory, corpus_file):
    return tiny(corpus_file, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def reported(capsys):
    """A function of a folder and arguments."""

    def run(folder, *arguments):
        capsys.readouterr()
        report.main([*arguments, "--checkpoint_dir", str(folder)])
        return capsys.readouterr().out

    return run
