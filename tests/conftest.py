"""A small configuration and a small corpus, so that every test runs on a CPU, without network, in seconds."""

import os

import pytest
import torch
from helpers import tiny, write_dialogues

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
os.fsync = lambda handle: None  # processes are killed here, never the machine; waiting for the disk is slow


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    return write_dialogues(tmp_path_factory.mktemp("corpus") / "dialogues.jsonl", 60)


@pytest.fixture
def tiny_settings(tmp_path, corpus_file):
    """Settings of a run that looks nothing up, all of whose files lie in tmp_path."""
    return tiny(corpus_file, tmp_path) | dict(
        phase2_learning_rate=0.002, dropout=0.3, retrieval="none", save_every_n_batches=2,
        save_min_seconds=0.0, artifacts=False,
    )  # fmt: skip


def pytest_xdist_auto_num_workers(config):
    """Of `-n auto`: a process a core, four at most (each takes about a gigabyte); GPU tests one by one."""
    return 0 if "gpu" in (config.option.markexpr or "") else min(4, os.cpu_count())


LONG = (  # files that take longest are begun first, so that no process is left alone with one at the end
    "test_compilation", "test_pretended_cuda", "test_commands", "test_notebook", "test_kills",
    "test_processes", "test_plan", "test_compare", "test_retrieval_stage", "test_generate", "test_contexts",
    "test_transformers_export", "test_stop", "test_batch_sizes", "test_lost_machine", "test_scale_check",
    "test_leaks", "test_estimate_memory", "test_runs", "test_retrieval_file", "test_stage", "test_reading",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The order of files is that of LONG, then as they were found; within a file nothing changes."""
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
