"""Text to ids and back, and a byte-level BPE trained on the training dialogues.

Built with the `tokenizers` library itself: transformers 5 turns GPT2TokenizerFast(vocab_file=, merges_file=) silently
into a tokenizer of one token.
"""

import codecs
import functools
import hashlib
import re

from newllm.progress import silent
from newllm.saving.stop import interruptible, poll

END_OF_TEXT = "<|endoftext|>"
LONGEST_WORD = 256  # bytes of what the trainer takes for a word: its time grows with their square
LESSON = 300_000  # characters of one dialogue that a tokenizer is trained on, at most


class Tokenizer:
    """A BPE over bytes, or one that falls back to them, with an id that ends a text; a literal "<|endoftext|>" is plain text.

    Args:
        name: "gpt2", "bpe" or that of a pretrained model.
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
        return [encoding.ids for encoding in interruptible(self._tokenizer.encode_batch, list(texts))]

    def decode(self, ids):
        """Text of a list of int, the end-of-text id as "<|endoftext|>"; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self._bytes.__getitem__, ids)).decode(errors="replace")

    def decoder(self):
        """Function that takes ids one after the other and gives the text that each completes, which may be "" (part of a character).

        Called without an id it gives what is left at the end, U+FFFD for an unfinished character: all together is `decode`.
        """
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        return lambda token=None: decode(b"", True) if token is None else decode(self._bytes[token])

    @functools.cached_property
    def _bytes(self):
        """UTF-8 bytes of each id."""
        spellings = [self._tokenizer.id_to_token(i) or "" for i in range(self.vocab_size)]
        if '"ByteFallback"' in self._json:  # characters, spaces as U+2581, and bytes as <0x00>
            return [
                bytes([int(spelling[3:5], 16)])
                if re.fullmatch("<0x[0-9A-F]{2}>", spelling)
                else spelling.replace("\u2581", " ").encode()
                for spelling in spellings
            ]
        # Every character of a token's spelling stands for one byte: a printable one for itself, the rest in order.
        from tokenizers.pre_tokenizers import ByteLevel

        letters = sorted(ByteLevel.alphabet())
        others = (byte for byte in range(256) if chr(byte) not in letters)
        byte_of = {letter: ord(letter) if ord(letter) < 256 else next(others) for letter in letters}
        return [
            bytes(map(byte_of.get, spelling)) if byte_of.keys() >= set(spelling) else spelling.encode()
            for spelling in spellings
        ]

    def token_bytes(self):
        """UTF-8 bytes each id stands for: int32 [V], 0 for the end of text."""
        import torch

        sizes = torch.tensor([len(piece) for piece in self._bytes], dtype=torch.int32)
        sizes[self.eos_id] = 0
        return sizes


def train_bpe(texts, vocab_size, progress=silent):
    """Byte-level BPE of at most `vocab_size` ids; id 0 ends a text, every byte has an id, so every text round-trips.

    Args:
        progress: function of (label, total, unit) to a context manager whose `update` gets the characters read.
    """
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(
            pre_tokenizers.ByteLevel.alphabet()
        ),  # the library returns it in random order
        show_progress=False,
    )
    words = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.FixedLength(length=LONGEST_WORD)]
    )
    lesson = [text[:LESSON] for text in texts]
    with progress("tokenizer", sum(map(len, lesson)), unit="char") as bar:

        def read():
            for text in lesson:
                yield text
                poll()
                bar.update(len(text))

        interruptible(tokenizer.train_from_iterator, read(), trainer, tick=lambda: bar.update(0))
    tokenizer.pre_tokenizer = words
    return Tokenizer("bpe", tokenizer.to_str())


def byte_level(model):
    """A `tokenizers` tokenizer that spells texts in bytes, as GPT-2's does, around a model of merges."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
