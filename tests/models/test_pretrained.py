"""Pretrained embeddings: had exactly, for their own ids, or the run stops with a sentence. No network."""

import importlib.util
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers

import train
from config import ResidualConfig
from newllm.data import hub
from newllm.data.tokens import GPT2, GPT2_REVISION, choose_tokenizer
from newllm.errors import UserError
from newllm.models.pretrained import load_embedding, require_own_ids
from newllm.saving.files import load_sealed

V, E = 11, 8


def gpt2(vocab_size=V, width=E):
    sizes = dict(vocab_size=vocab_size, n_embd=width, n_layer=1, n_head=1, n_positions=4)
    torch.manual_seed(0)
    return transformers.GPT2Model(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


@pytest.fixture
def folder(tmp_path):
    """A GPT-2 of 11 tokens and width 8 in transformers' format."""
    gpt2().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def save_tokenizer(path, text):
    """A byte-level BPE of 270 ids at most, learned from a text, in transformers' format."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = dict(special_tokens=["<|end|>"], initial_alphabet=alphabet)
    made.train_from_iterator([text], tokenizers.trainers.BpeTrainer(vocab_size=270, **special))
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>").save_pretrained(path)
    return str(path)


def sentence(source, vocab_size=V, embed_dim=E):
    """The one line of the error that the source gives."""
    with pytest.raises(UserError) as caught:
        load_embedding(str(source), vocab_size, embed_dim)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and str(source) in message
    return message


def test_a_folder_gives_its_input_embedding(folder, tmp_path):
    """Bit for bit, in fp32, of a whole language model too; without rows that no id has. None is random."""
    given = gpt2().wte.weight
    vectors = load_embedding(str(folder), V - 3, E)
    assert torch.equal(vectors, given[: V - 3]) and not vectors.requires_grad
    whole = transformers.GPT2LMHeadModel(gpt2().config).bfloat16()
    whole.save_pretrained(tmp_path / "whole")
    half = load_embedding(str(tmp_path / "whole"), V, E)
    assert half.dtype == torch.float32 and torch.equal(half, whole.transformer.wte.weight.float())
    assert load_embedding("random", V, E) is None


@pytest.mark.skipif(importlib.util.find_spec("wordllama") is None, reason="needs the package wordllama")
def test_wordllama_gives_vectors_that_know_meanings():
    """Its 32,000 x 256, row by row those of its tokenizer: a dog is nearer to an animal than to a law."""
    vectors, (tokenizer, _) = load_embedding("wordllama", 32000, 256), choose_tokenizer("wordllama")
    dog, animal, law = (vectors[tokenizer.encode(f" {word}")].mean(0) for word in ("dog", "animal", "law"))
    assert vectors.dtype == torch.float32
    assert torch.cosine_similarity(dog, animal, dim=0) > 0.2 + torch.cosine_similarity(dog, law, dim=0)


@pytest.mark.parametrize(("vocab_size", "embed_dim"), [(V + 1, E), (V, E + 1)])
def test_a_wrong_shape_names_both_shapes(folder, vocab_size, embed_dim):
    message = sentence(folder, vocab_size, embed_dim)
    assert f"{V} x {E}" in message and f"{vocab_size} x {embed_dim}" in message


def rewrite(change):
    """A damage that changes the tensors of the folder's weights."""

    def damage(weights):
        tensors = load_file(weights)
        change(tensors)
        save_file(tensors, weights, metadata={"format": "pt"})

    return damage


DAMAGES = {  # what happens to the weights, by what the sentence says
    "": Path.unlink,
    "cannot be had": lambda weights: weights.write_bytes(weights.read_bytes()[:500]),
    "no token embedding": rewrite(lambda tensors: tensors.pop("wte.weight")),
    "all zeros": rewrite(lambda tensors: tensors["wte.weight"].zero_()),
    "not finite": rewrite(lambda tensors: tensors["wte.weight"].fill_(float("nan"))),
}


@pytest.mark.parametrize("words", DAMAGES)
def test_what_cannot_be_had_is_one_sentence(folder, words):
    """No weights are drawn in place of missing ones, which would be another experiment."""
    DAMAGES[words](folder / "model.safetensors")
    message = sentence(folder)
    assert words in message and "--embeddings random" in message


def test_a_missing_folder_or_package_is_one_sentence(monkeypatch, folder):
    """It says what brings it, or the first line of the reason."""
    assert "--embeddings random" in sentence(folder.parent / "absent")
    monkeypatch.setattr(hub, "load_model", Mock(side_effect=OSError("cut off\nsecond line")))
    message = sentence("gpt2", 50257, 768)
    assert "cut off" in message and "second" not in message
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "newllm[wordllama]" in sentence("wordllama")


def test_a_hub_that_is_away_is_asked_once_and_not_needed_for_what_was_downloaded(monkeypatch, folder):
    """transformers alone would ask for most of a minute. A snapshot in the cache is a folder like others."""
    monkeypatch.setattr(hub, "probe", Mock(side_effect=hub.Unreachable("no internet connection")))
    assert "no internet connection" in sentence("owner/never-downloaded")
    snapshot = Mock(return_value=str(folder))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert torch.equal(load_embedding("gpt2", V, E), gpt2().wte.weight)
    snapshot.assert_called_once_with(GPT2, revision=GPT2_REVISION, local_files_only=True)


def test_vectors_are_taken_for_their_own_ids_alone(tmp_path, folder):
    """Other tokens under the same numbers are refused; the same tokens elsewhere are not."""
    one = save_tokenizer(tmp_path / "one", "hello hello there, who is here?")
    copy = save_tokenizer(tmp_path / "copy", "hello hello there, who is here?")
    other = save_tokenizer(tmp_path / "other", "completely different words in this, my text")
    for embeddings, tokenizer in (("random", "bpe"), (one, one), (one, copy), ("gpt2", "gpt2")):
        require_own_ids(embeddings, tokenizer)
    refused = (("wordllama", "bpe"), ("gpt2", "bpe"), (one, "bpe"), (one, other), (other, copy))
    for embeddings, tokenizer in refused:
        with pytest.raises(UserError, match="--tokenizer auto") as caught:
            require_own_ids(embeddings, tokenizer)
        assert embeddings in str(caught.value) and tokenizer in str(caught.value)
    with pytest.raises(UserError, match="does not give texts back"):
        require_own_ids(str(folder), one)  # weights without a tokenizer


def test_a_run_on_pretrained_vectors_needs_them_where_it_begins_alone(tiny_settings, tmp_path, capsys):
    """Other tokens' vectors are refused before training. With others in the folder, a run keeps its own."""
    folder, checkpoints = tmp_path / "pretrained", tmp_path / "checkpoints"
    save_tokenizer(folder, "User: hello\nAssistant: hello hello")
    given = gpt2(280, 16)  # more rows than ids
    given.save_pretrained(folder)
    settings = tiny_settings | dict(embeddings=str(folder), tokenizer="auto", untrained_control=False)
    with pytest.raises(UserError, match="--tokenizer auto"):
        train.main(ResidualConfig(**settings | dict(tokenizer="bpe", vocab_size=270)))
    assert "== " not in capsys.readouterr().out and not checkpoints.exists()
    train.main(ResidualConfig(**settings, phase="1"))
    own = given.wte.weight.detach().clone()
    torch.nn.init.normal_(given.wte.weight)
    given.save_pretrained(folder)
    summary = train.main(ResidualConfig(**settings))
    assert summary["tokenizer"] == "pretrained" and summary["vocab_size"] < 280
    [frozen] = checkpoints.glob("model_frozen_*.pt")
    weight, own = load_sealed(frozen)["embedding.weight"], own[: summary["vocab_size"]]
    torch.testing.assert_close(weight / weight.norm(), own / own.norm())
