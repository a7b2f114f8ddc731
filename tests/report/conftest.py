"""Settings of a run of a second or two, and what the report prints."""

import pytest

from scripts import report


@pytest.fixture(scope="module")
def settings(tmp_path_factory, corpus_file):
    root = tmp_path_factory.mktemp("runs")
    return dict(
        data_source=str(corpus_file), tokenizer="bpe", vocab_size=300, num_samples=12, val_samples=6,
        max_seq_length=24, context_dim=16, embed_dim=16, num_layers=1, phase1_max_iterations=3,
        phase1_batch_size=4, phase2_epochs=3, phase2_batch_size=4, min_batches=3,
        precision="fp32", device="cpu", cache_dir=str(root / "cache"),
        checkpoint_dir=str(root / "checkpoints"),
    )  # fmt: skip


@pytest.fixture
def reported(capsys):
    """A function of a folder and arguments."""

    def run(folder, *arguments):
        capsys.readouterr()
        report.main([*arguments, "--checkpoint_dir", str(folder)])
        return capsys.readouterr().out

    return run
