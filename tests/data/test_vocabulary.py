"""Tokenizers of pretrained models: had exactly, every text back byte by byte, or one sentence."""

import importlib.util
import json

import pytest
import tokenizers
import transformers
from checks import random_streams
from hub_fakes import dialogue
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from newllm.data.samples import load_data
from newllm.data.tokens import END_OF_TEXT
from newllm.data.vocabulary import WORDLLAMA_SIZE, choose_tokenizer, tokenizer_choice
from newllm.errors import UserError

TEXTS = [
    "User: hello  world\n\n don't",
    " Gr\xf6\xdfe na\xefve e\u0301 \u6771\u4eac \U0001f642\x00",
    f"literal </s> {END_OF_TEXT}",
]


def sentencepiece():
    """Spelled as Llama's: spaces as U+2581, one put before a text, bytes as <0x00>, a start added; normalized."""
    ids = {
        token: number
        for number, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    }
    ids |= {
        token: len(ids) + number
        for number, token in enumerate(["\u2581", "h", "e", "l", "o", "he", "hel", "\u2581hel"])
    }
    merges = [("h", "e"), ("he", "l"), ("\u2581", "hel")]
    made = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    steps = (
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    )
    made.decoder = decoders.Sequence(list(steps))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made, "</s>"


def byte_level():
    """As Qwen's and Llama 3's, with a normalizer that changes texts and a space put before them."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    made.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<|end|>"], initial_alphabet=alphabet
    )
    made.train_from_iterator(["hello hello"], trainer)
    return made, "<|end|>"


@pytest.fixture(params=[sentencepiece, byte_level])
def folder(request, tmp_path):
    """A tokenizer as a model's folder has it."""
    made, end = request.param()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end).save_pretrained(
        tmp_path / "model"
    )
    return tmp_path / "model"


needs_wordllama = pytest.mark.skipif(
    importlib.util.find_spec("wordllama") is None, reason="needs the package wordllama"
)


def holds(tokenizer):
    """What the project promises of every tokenizer."""
    sizes = tokenizer.token_bytes()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and sizes[ids].sum() == len(text.encode())
        assert tokenizer.eos_id not in ids and "".join(map(tokenizer.decoder(), ids)) == text
    assert len(list(random_streams(tokenizer, 1000))) == 1000
    assert sizes[tokenizer.eos_id] == 0 and tokenizer.decode([tokenizer.eos_id]) == END_OF_TEXT


def test_a_folder_gives_every_text_back(folder):
    """Nothing is put before a text, normalized or added, though the model's own tokenizer does all of that."""
    tokenizer, reason = choose_tokenizer(str(folder))
    holds(tokenizer)
    assert tokenizer.name == "model" and not reason
    again = type(tokenizer).from_json(tokenizer.name, tokenizer.to_json())
    assert again.fingerprint == tokenizer.fingerprint and again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_ids_are_those_of_the_model(tmp_path):
    """The rows of its embedding keep their tokens."""
    made, end = sentencepiece()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end).save_pretrained(tmp_path)
    tokenizer, _ = choose_tokenizer(str(tmp_path))
    vocabulary = made.get_vocab()
    assert tokenizer.eos_id == vocabulary["</s>"] and tokenizer.vocab_size == len(vocabulary)
    assert tokenizer.encode("hel hel") == [vocabulary["hel"], vocabulary["\u2581hel"]]


@needs_wordllama
def test_wordllama():
    """The package's 32,000 ids."""
    tokenizer, _ = choose_tokenizer("wordllama")
    holds(tokenizer)
    assert tokenizer.vocab_size == WORDLLAMA_SIZE and tokenizer.eos_id == 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("auto", "random"), "auto"),
        (("auto", "wordllama"), "wordllama"),
        (("auto", "a/model"), "a/model"),
        (("bpe", "random"), "bpe"),
        (("wordllama", "random"), "wordllama"),
    ],
)
def test_auto_takes_the_tokenizer_of_the_embeddings(given, expected, settings):
    """Vectors without their own tokenizer mean nothing."""
    tokenizer, embeddings = given
    assert tokenizer_choice(settings(tokenizer=tokenizer, embeddings=embeddings)) == expected


def test_data_are_cached_by_the_tokenizer_itself(settings, write_jsonl, folder):
    """Two tokenizers under one name are two data sets; one is a hit the second time."""
    talk = str(write_jsonl([dialogue(f"hello {n}") for n in range(20)]))
    first = load_data(settings(data_source=talk, tokenizer=str(folder)))
    assert not first.cache_hit and load_data(settings(data_source=talk, tokenizer=str(folder))).cache_hit
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))
    other = load_data(settings(data_source=talk, tokenizer=str(folder)))
    assert not other.cache_hit and other.fingerprint != first.fingerprint


def test_a_tokenizer_that_changes_texts_is_refused(tmp_path):
    """Its tokens cannot be counted in bytes."""
    made = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "hello": 1, "[SEP]": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="[SEP]").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not give texts back"):
        choose_tokenizer(str(tmp_path))


def test_a_unigram_model_is_refused(tmp_path):
    """As T5's: its pieces have probabilities instead of merges, and its list of them is no table of ids."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("\u2581", -1.0), ("a", -2.0)]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not give texts back"):
        choose_tokenizer(str(tmp_path))


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    """Nothing could stand between two dialogues."""
    made, _ = byte_level()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no token that ends a text"):
        choose_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["bpee", "absent/model"])
def test_a_tokenizer_that_cannot_be_had_is_one_sentence(name):
    """It names the choices there are."""
    with pytest.raises(UserError) as caught:
        choose_tokenizer(name)
    message = str(caught.value)
    assert name in message and "wordllama" in message and "\n" not in message


def test_a_missing_package_is_one_sentence(monkeypatch):
    """It says what brings it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"newllm\[wordllama\]"):
        choose_tokenizer("wordllama")
