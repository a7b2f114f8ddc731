"""Text to ids and back, and a byte-level BPE trained on the training dialogues.

Built with the `tokenizers` library itself: transformers 5 turns GPT2TokenizerFast(vocab_file=, merges_file=) silently
into a tokenizer of one token.
"""

import hashlib
import re

END_OF_TEXT = "<|endoftext|>"


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

        spellings = [self._tokenizer.id_to_token(i) for i in range(self.vocab_size)]
        if '"ByteFallback"' in self._json:  # characters, spaces as U+2581, and bytes as <0x00>
            sizes = [
                1 if re.fullmatch("<0x[0-9A-F]{2}>", spelling) else len(spelling.replace("\u2581", " ").encode())
                for spelling in spellings
            ]
        else:  # every character of a token's spelling stands for one byte
            sizes = [len(spelling) for spelling in spellings]
        sizes[self.eos_id] = 0
        return torch.tensor(sizes, dtype=torch.int32)


def train_bpe(texts, vocab_size):
    """Byte-level BPE of at most `vocab_size` ids; id 0 ends a text, every byte has an id, so every text round-trips."""
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # the library returns it in random order
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer("bpe", tokenizer.to_str())


def byte_level(model):
    """A `tokenizers` tokenizer that spells texts in bytes, as GPT-2's does, around a model of merges."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
