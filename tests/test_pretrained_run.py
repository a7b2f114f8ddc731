"""A run on the token vectors of a pretrained model: its tokenizer, its vectors, and a model file that needs neither."""

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

import train
from config import ResidualConfig
from newllm.errors import UserError
from newllm.saving.files import load_sealed
from newllm.saving.trained import load_model

E = 16


@pytest.fixture
def folder(tmp_path):
    """A GPT-2 with a tokenizer of its own, as a folder; its embedding has more rows than the tokenizer has ids."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<|end|>"], initial_alphabet=alphabet
    )
    made.train_from_iterator(["User: hello\nAssistant: hello hello"], trainer)
    path = tmp_path / "pretrained"
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>").save_pretrained(path)
    sizes = dict(vocab_size=made.get_vocab_size() + 10, n_embd=E, n_layer=1, n_head=1, n_positions=4)
    torch.manual_seed(0)
    transformers.GPT2Model(transformers.GPT2Config(**sizes)).save_pretrained(path)
    return path


def test_a_run_on_a_pretrained_embedding_leaves_a_model_of_its_own(tiny_settings, folder):
    """The vectors' directions outlive training; the model file gives the same logits when the folder is gone; so does a
    run that is continued."""
    settings = tiny_settings | dict(embeddings=str(folder), tokenizer="auto", artifacts=True)
    summary = train.main(ResidualConfig(**settings))
    assert summary["tokenizer"] == "pretrained" and summary["vocab_size"] < 280
    given = (
        transformers.AutoModel.from_pretrained(folder)
        .get_input_embeddings()
        .weight.detach()[: summary["vocab_size"]]
    )
    [path] = (folder.parent / "checkpoints").glob("*/models/*.pth")
    (folder / "model.safetensors").unlink()
    model, tokenizer = load_model(load_sealed(path))
    weight = model.embedding.weight.detach()
    torch.testing.assert_close(weight / weight.norm(), given / given.norm())
    ids = torch.tensor([tokenizer.encode("User: hello")])
    assert model.advance(ids[:, 0])[0].isfinite().all() and tokenizer.decode(ids[0].tolist()) == "User: hello"


def test_a_run_needs_its_vectors_again_only_where_it_begins(tiny_settings, folder):
    """Continued with other vectors in the folder, it keeps the ones it began with, which lie beside the checkpoint."""
    settings = tiny_settings | dict(embeddings=str(folder), tokenizer="auto")
    train.main(ResidualConfig(**settings, phase="1"))
    state = load_sealed(folder.parent / "checkpoints" / "model_latest.pt")
    model = transformers.AutoModel.from_pretrained(folder)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(folder)
    train.main(ResidualConfig(**settings))
    again = load_sealed(folder.parent / "checkpoints" / "model_latest.pt")
    assert again["run_id"] == state["run_id"] and again["frozen"] == state["frozen"]


def test_vectors_of_other_tokens_are_refused_before_training(tiny_settings, folder, capsys):
    """The tokenizer that is trained here numbers other tokens than those that the vectors were learned for."""
    sizes = transformers.AutoModel.from_pretrained(folder).get_input_embeddings().weight.shape
    settings = tiny_settings | dict(embeddings=str(folder), tokenizer="bpe", vocab_size=sizes[0] - 5)
    with pytest.raises(UserError, match="--tokenizer auto"):
        train.main(ResidualConfig(**settings))
    assert "== " not in capsys.readouterr().out and not (folder.parent / "checkpoints").exists()
