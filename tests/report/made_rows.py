"""Rows of results as a comparison leaves them, with figures that a test chooses."""

import math

import numpy as np

LENGTH, SAMPLES = 10, 40


def row(arm, seed, loss, tokens=1000, **more):
    """A run whose samples differ among each other far more than arms do, as dialogues do."""
    dialogues = np.random.default_rng(0).normal(0, 10, SAMPLES)
    noise = np.random.default_rng(seed).normal(0, 0.2, SAMPLES)
    nats = (loss * LENGTH + dialogues - dialogues.mean() + noise).tolist()
    settings = {"max_seq_length": LENGTH}
    return dict(
        run=f"{arm}-{tokens}-{seed}", arm=arm, seed=seed, changes={}, settings=settings, tokenizer="bpe",
        vocab_size=300, train_tokens=tokens, model_type="context", contexts="none", parameters=10,
        peak_memory_mb=1000.0, seconds_training=5.0 + seed, val_loss=loss, val_ppl=math.exp(loss),
        val_bpb=loss / 3, val_sample_nats=nats, val_ppl_unigram=600.0, val_ppl_bigram=200.0, val_ppl_kn=150.0,
    ) | more  # fmt: skip


def rows(*losses, seeds=3, **more):
    return [row(arm, seed, loss + 0.001 * seed, **more) for arm, loss in losses for seed in range(seeds)]


def looked_up(arm, ppl, counting=100.0, seeds=3, **more):
    """Rows with retrieval, whose perplexity that is, and of counting with the same."""
    made = rows((arm, 5.0), seeds=seeds, **more)
    for own in made:
        for key, value in (("retrieval", ppl), ("counting", counting)):
            own[f"val_sample_nats_{key}"] = row("", own["seed"], math.log(value))["val_sample_nats"]
        own |= dict(val_ppl_retrieval=ppl, val_ppl_retrieval_counting=counting)
    return made
