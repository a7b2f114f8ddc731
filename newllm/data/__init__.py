"""Dialogues, tokenizers, packed samples and their cache."""
