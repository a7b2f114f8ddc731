"""Pretrained embeddings: had exactly, or the run stops with a sentence. No network."""

import importlib.util

import huggingface_hub
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers

from newllm.data import hub
from newllm.data.vocabulary import GPT2, GPT2_REVISION, choose_tokenizer
from newllm.errors import UserError
from newllm.models.pretrained import load_embedding, require_own_ids

V, E = 11, 8
WEIGHTS = "model.safetensors"


@pytest.fixture
def gpt2():
    """A GPT-2 of 11 tokens and width 8."""
    sizes = dict(vocab_size=V, n_embd=E, n_layer=1, n_head=1, n_positions=4, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    return transformers.GPT2Model(transformers.GPT2Config(**sizes))


@pytest.fixture
def folder(tmp_path, gpt2):
    """The same in transformers' format."""
    gpt2.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def sentence(source, vocab_size=V, embed_dim=E):
    """The one line of the error that the source gives."""
    with pytest.raises(UserError) as caught:
        load_embedding(str(source), vocab_size, embed_dim)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and str(source) in message
    return message


def test_random_is_no_matrix():
    """The model's own initialisation stands."""
    assert load_embedding("random", V, E) is None


def test_a_folder_gives_its_input_embedding(folder, gpt2):
    """Bit for bit, in fp32, without gradient."""
    got = load_embedding(str(folder), V, E)
    assert torch.equal(got, gpt2.wte.weight)
    assert got.dtype == torch.float32 and not got.requires_grad


def test_half_precision_weights_come_in_fp32(tmp_path, gpt2):
    """What is stored in bf16 is widened."""
    gpt2.bfloat16().save_pretrained(tmp_path / "half")
    got = load_embedding(str(tmp_path / "half"), V, E)
    assert got.dtype == torch.float32 and torch.equal(got, gpt2.wte.weight.float())


def test_a_language_model_head_is_no_hindrance(tmp_path, gpt2):
    """Folders of whole language models are the usual ones."""
    whole = transformers.GPT2LMHeadModel(gpt2.config)
    whole.save_pretrained(tmp_path / "whole")
    assert torch.equal(load_embedding(str(tmp_path / "whole"), V, E), whole.transformer.wte.weight)


def test_rows_beyond_the_tokenizer_are_left_out(folder, gpt2):
    """Some models have more rows than their tokenizer has ids."""
    assert torch.equal(load_embedding(str(folder), V - 3, E), gpt2.wte.weight[: V - 3])


@pytest.mark.skipif(importlib.util.find_spec("wordllama") is None, reason="needs the package wordllama")
def test_wordllama_gives_vectors_that_know_meanings():
    """Its 32,000 x 256, row by row those of its tokenizer: a dog is nearer to an animal than to a law."""
    vectors, (tokenizer, _) = load_embedding("wordllama", 32000, 256), choose_tokenizer("wordllama")
    dog, animal, law = (vectors[tokenizer.encode(f" {word}")].mean(0) for word in ("dog", "animal", "law"))
    assert vectors.dtype == torch.float32
    assert torch.cosine_similarity(dog, animal, dim=0) > 0.2 + torch.cosine_similarity(dog, law, dim=0)


def test_a_missing_package_is_one_sentence(monkeypatch):
    """It says what brings it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "newllm[wordllama]" in sentence("wordllama")


@pytest.mark.parametrize(("vocab_size", "embed_dim"), [(V + 1, E), (V, E + 1), (2 * V, 2 * E)])
def test_a_wrong_shape_names_both_shapes(folder, vocab_size, embed_dim):
    """The message says what is there and what is needed."""
    message = sentence(folder, vocab_size, embed_dim)
    assert f"{V} x {E}" in message and f"{vocab_size} x {embed_dim}" in message


def test_a_missing_folder_is_one_sentence(tmp_path):
    """It says what to do instead."""
    assert "--embeddings random" in sentence(tmp_path / "absent")


def test_a_folder_without_a_model_is_one_sentence(tmp_path):
    """Empty, or with a configuration but no weights."""
    assert "--embeddings random" in sentence(tmp_path)


def test_a_configuration_without_weights_is_one_sentence(folder):
    """No weights are drawn in place of a missing file."""
    (folder / WEIGHTS).unlink()
    sentence(folder)


def test_a_truncated_file_is_one_sentence(folder):
    """A download that was cut off."""
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    sentence(folder)


def test_weights_without_the_embedding_are_one_sentence(folder):
    """A random matrix in its place would be another experiment."""
    tensors = load_file(folder / WEIGHTS)
    del tensors["wte.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    sentence(folder)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_vectors_without_a_direction_are_one_sentence(folder, value):
    """They could not be scaled for the logits."""
    tensors = load_file(folder / WEIGHTS)
    tensors["wte.weight"].fill_(value)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert "all zeros or not finite" in sentence(folder)


@pytest.mark.parametrize(
    "error", [OSError("cut off\nsecond line"), ValueError("bad name\nsecond line"), OSError()]
)
def test_gpt2_that_cannot_be_had_is_one_sentence(monkeypatch, error):
    """The first line of the reason is in it; nothing random takes its place."""

    def broken(name, **options):
        assert (name, options) == (GPT2, dict(revision=GPT2_REVISION, output_loading_info=True))
        raise error

    monkeypatch.setattr(hub, "probe", lambda path: None)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", broken)
    message = sentence("gpt2", 50257, 768)
    assert (str(error) or "OSError").splitlines()[0] in message and "second line" not in message


@pytest.fixture
def away(monkeypatch):
    """A hub that cannot be reached; transformers is not to try it."""

    def unreachable(path):
        raise hub.Unreachable("no internet connection")

    monkeypatch.setattr(hub, "probe", unreachable)


def test_a_hub_that_is_away_is_asked_once(monkeypatch, away):
    """transformers alone would go on asking for most of a minute."""
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", None)
    assert "no internet connection" in sentence("owner/never-downloaded")


def test_what_was_downloaded_needs_no_hub(monkeypatch, away, folder, gpt2):
    """The snapshot in the hub's cache is a folder like any other."""
    wanted = []

    def snapshot(name, revision, local_files_only):
        wanted.append((name, revision, local_files_only))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert torch.equal(load_embedding("gpt2", V, E), gpt2.wte.weight)
    assert wanted == [(GPT2, GPT2_REVISION, True)]


def save_tokenizer(path, text):
    """A byte-level BPE of 270 ids, learned from a text, in transformers' format."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<|end|>"], initial_alphabet=alphabet
    )
    made.train_from_iterator([text], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>").save_pretrained(path)
    assert made.get_vocab_size() == 270
    return str(path)


def test_vectors_are_taken_for_their_own_ids_alone(tmp_path, folder):
    """Other tokens under the same numbers are refused, whatever the sizes; the same tokens elsewhere are not."""
    one = save_tokenizer(tmp_path / "one", "hello hello there, who is here?")
    copy = save_tokenizer(tmp_path / "copy", "hello hello there, who is here?")
    other = save_tokenizer(tmp_path / "other", "completely different words in this, my text")
    for embeddings, tokenizer in (("random", "bpe"), (one, one), (one, copy), ("gpt2", "gpt2")):
        require_own_ids(embeddings, tokenizer)
    for embeddings, tokenizer in (
        ("wordllama", "bpe"),
        ("gpt2", "bpe"),
        (one, "bpe"),
        (one, other),
        (other, copy),
    ):
        with pytest.raises(UserError, match="--tokenizer auto") as caught:
            require_own_ids(embeddings, tokenizer)
        assert embeddings in str(caught.value) and tokenizer in str(caught.value)
    with pytest.raises(UserError, match="tokenizer .* does not give texts back"):
        require_own_ids(str(folder), one)  # weights without a tokenizer
