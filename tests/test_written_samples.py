"""Samples of a run: made once, from held-out beginnings that the seed chooses, as scripts.generate writes."""

import signal
from html import unescape
from types import SimpleNamespace

import pytest
import torch
from helpers import stop_after
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import train
from config import ResidualConfig
from newllm.data.samples import load_data
from newllm.data.tokens import train_bpe
from newllm.generate import NEW_TOKENS, narrowed, samples
from newllm.models.baselines import build_model
from newllm.report.page import artifact_paths, page
from newllm.report.record import find_records, read_record
from newllm.report.summary import summary_lines
from newllm.saving.stop import Interrupt, Stopped
from scripts import generate as script

ALL = dict(retrieval="ngram", untrained_control=False, artifacts=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory, corpus_file):
    """(settings, summary) of a complete run that looks things up."""
    root = tmp_path_factory.mktemp("samples")
    settings = dict(
        data_source=str(corpus_file), tokenizer="bpe", vocab_size=300, num_samples=12, val_samples=6,
        max_seq_length=24, context_dim=16, embed_dim=16, num_layers=1, phase1_max_iterations=3,
        phase2_epochs=2, min_batches=3, precision="fp32", device="cpu", save_every_n_batches=2,
        save_min_seconds=0.0, cache_dir=str(root / "cache"), checkpoint_dir=str(root / "checkpoints"),
    )  # fmt: skip
    return settings | ALL, train.main(ResidualConfig(**settings | ALL))


def test_prompts_are_beginnings_of_held_out_dialogues_by_the_seed(made):
    """Three of them, each of another sample, none longer than the first turn; another seed, others."""
    settings, summary = made
    data = load_data(ResidualConfig(**settings))
    beginnings = {data.tokenizer.decode(ids.tolist()[:16]) for ids in data.val}
    prompts = [sample["prompt"] for sample in summary["samples"]]
    assert len(set(prompts)) == 3 and all("\nAssistant" not in prompt for prompt in prompts)
    assert all(any(begun.startswith(prompt) for begun in beginnings) for prompt in prompts)
    model = build_model(ResidualConfig(**settings), data.vocab_size)
    others = [[sample["prompt"] for sample in samples(model, data, seed)] for seed in (42, 0, 1, 2)]
    assert others[0] == prompts and sum(other != prompts for other in others[1:]) > 1


def test_the_command_writes_the_same(made, capsys):
    """From the same prompt as many tokens, by the run's seed or one or two more, alone or with retrieval."""
    settings, summary = made
    for seed, sample in enumerate(summary["samples"], start=42):
        for name, retrieval in (("network", "none"), ("retrieval", "model")):
            capsys.readouterr()
            script.main([
                f"--model_path={settings['checkpoint_dir']}", f"--prompt={sample['prompt']}",
                f"--max_tokens={NEW_TOKENS}", f"--seed={seed}", f"--retrieval={retrieval}",
            ])  # fmt: skip
            assert capsys.readouterr().out == sample["prompt"] + sample[name] + "\n"
    assert any(sample["network"] != sample["retrieval"] for sample in summary["samples"])


@pytest.mark.parametrize("where", ["within Phase 2", "while it writes"])
def test_a_run_cut_off_writes_the_same(made, tmp_path, monkeypatch, where):
    """To the bit, and once: the complete run that is started again takes what it has."""
    settings, summary = made
    config = ResidualConfig(**settings | dict(checkpoint_dir=str(tmp_path), artifacts=False))
    if where == "within Phase 2":
        stop_after(config, 12)
    else:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            patch.setattr("train.samples", interrupted)
            train.main(config)
    assert train.main(config)["samples"] == summary["samples"]
    monkeypatch.setattr("train.samples", None)
    assert train.main(config)["samples"] == summary["samples"]


def interrupted(*arguments):
    Interrupt.current.signal = signal.SIGTERM
    return samples(*arguments)


def test_they_are_in_the_record_and_no_figure(made):
    """The record has them for who reads it; the table of all runs and the text's figures do not."""
    settings, summary = made
    (record,) = map(read_record, find_records(settings["checkpoint_dir"]))
    assert record.summary["samples"] == summary["samples"]
    paths = artifact_paths(record.folder, record.kind, record.run)
    assert "samples" not in paths["table"].read_text().partition("\n")[0].split(",")
    text = paths["summary"].read_text()
    assert text.count("SAMPLE, ") == 3 and "  samples: " not in text
    assert all(repr(sample["retrieval"]) in text for sample in summary["samples"])


def test_a_model_that_reads_no_new_text_has_none(tiny_settings):
    """Whitened contexts, a control; and a run of Phase 1 alone has no model to write with."""
    whitened = dict(freeze_context=True, whiten_context=True, untrained_control=False)
    assert train.main(ResidualConfig(**tiny_settings | whitened))["samples"] == []
    assert "samples" not in train.main(ResidualConfig(**tiny_settings | dict(phase="1")))


def test_without_retrieval_the_network_writes_alone(tiny_settings):
    """Of a baseline too: the texts are there, those of retrieval are not."""
    summary = train.main(ResidualConfig(**tiny_settings | dict(model_type="transformer")))
    assert [sample["retrieval"] for sample in summary["samples"]] == [None] * 3
    assert any(sample["network"] for sample in summary["samples"])


@pytest.mark.parametrize("text, prompt", [
    ("User: hi\nAssistant: hello", "User: hi"),
    ("User: a\nb\nUser: c", "User: a\nb"),
    ("User: \u6771\u4eac\u6771\u4eac\u6771\u4eac", "User: \u6771\u4eac\u6771"),
])  # fmt: skip
def test_a_prompt_is_whole_characters_of_one_turn(text, prompt):
    """With a token a byte: 16 of them end within a character, which is left out."""
    tokenizer = train_bpe(["x"], 257)
    sample = torch.tensor([*tokenizer.encode(text), *[tokenizer.eos_id] * 40], dtype=torch.int32)[:40]
    data = SimpleNamespace(val=sample[None], tokenizer=tokenizer)
    model = build_model(ResidualConfig(model_type="token", context_dim=8, embed_dim=8), tokenizer.vocab_size)
    (written,) = samples(model, data, 0)
    assert written["prompt"] == prompt


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(0.8, 0, 0.9), (1.0, 5, 1.0), (0.3, 7, 0.5), (2, 900, 1e-9)]
)
def test_filters_are_those_of_transformers(temperature, top_k, top_p):
    """To the bit, ties and nuclei of one token included."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)).mul(8).round() / 4
    filters = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        filters.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        filters.append(TopPLogitsWarper(top_p))
    assert narrowed(logits, temperature, top_k, top_p).equal(filters(None, logits[None])[0])


def test_what_a_model_writes_breaks_no_page(made):
    """Tags, Markdown, quotes, control characters, right-to-left marks, nothing: text within the page."""
    record = read_record(find_records(made[0]["checkpoint_dir"])[0])
    nasty = "</blockquote><script>alert(1)</script> **b** | `c` {{ 7 * 7 }} <!-- & \u202e\x1b[31m"
    before = page(record, {})
    record.summary["samples"] = [{"prompt": nasty, "network": nasty, "retrieval": ""}]
    text = page(record, {})
    for tag in ("<script", "<!--", "</blockquote>"):
        assert text.count(tag) <= before.count(tag)
    assert unescape(text).count(nasty) == 2 and "(the end of the text)" in text
    lines = summary_lines(record, {})
    assert [line for line in lines if "alert" in line] == [
        f"  {name}: {nasty!r}" for name in ("prompt", "network")
    ]
    record.summary["samples"] = []
    assert "cannot read a new text" in page(record, {})
    del record.summary["samples"]
    assert "<h2>Samples" not in page(record, {})
