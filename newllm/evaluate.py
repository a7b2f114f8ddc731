"""From (model, data) to metrics: the same code before, during and after training, and in test.py.

Contexts here are the trajectory itself, step by step from c_0 = 0 for many sequences at once: exact for any
map, converging or not, and on short samples cheaper than the sweeps to reach it.
Arguments: ids [B, T+1], samples whose last id is only a target; autocast, function that gives the context
manager of the precision. Shapes: B sequences, T tokens, C and E widths, V vocabulary.
"""

import hashlib
import math

import torch
from torch.nn import functional

from newllm.fixed_point import diagnostics
from newllm.fixed_point.solver import sequential, sweep
from newllm.memory import map_parts
from newllm.models.baselines import Baseline
from newllm.models.cross_entropy import linear_token_nll
from newllm.progress import silent
from newllm.saving.stop import poll

RANK_TOKENS = 10_000  # tokens behind an effective rank; the ceiling is computed for the same number
CURVE_SEQUENCES = 32  # sequences behind cold-start and memory curves
MAX_SWEEPS = 16
EXPONENT_SEQUENCES, EXPONENT_TOKENS = 16, 64  # of each its first tokens, behind a Lyapunov exponent
NEAR, NEAR_SEQUENCES = 0.01, 4  # an error that is small, and of how many sequences
NEAR_SWEEPS = 64  # to it, at most, and half as many as there are tokens: any map is exact after all of them
SPECTRUM_POINTS = 64  # singular values kept of a spectrum, evenly over its ranks
SEQUENCES_AT_A_TIME = 256
LOOKED_UP_LOGITS = 1 << 23  # held at a time with retrieval, some five times over
LOOKED_UP_LENGTH = 512  # tokens of a long text that are looked up together


def encode(model, ids):
    """What the head reads: ids [B, T] -> (contexts [B, T, C], token streams [B, T, E])."""
    if isinstance(model, Baseline):
        return model.encode(ids)
    return sequential(model.step, model.embed(ids), model.context_dim)


@torch.no_grad()
def trajectories(model, ids, autocast, device, dtype=torch.float32):
    """Contexts [B, T, C] and token streams [B, T, E] of samples, in a type to store them in."""

    def evaluated(part):
        poll()
        with autocast():
            contexts, streams = encode(model, ids[part, :-1].to(device).long())
        return contexts.to(dtype), streams.to(dtype)

    contexts, streams = zip(*map_parts(evaluated, len(ids), SEQUENCES_AT_A_TIME), strict=True)
    return torch.cat(contexts), torch.cat(streams)


@torch.no_grad()
def token_scores(model, ids, autocast, device, features=None, retrieval=None):
    """[(nats [b, T], hits [b, T]), ...] of the targets of some samples at a time.

    Args:
        features: function of a slice of the samples to their (contexts, streams), when these are at hand.
        retrieval: what the model looks up, whose nats [b, T] then come third; or None.
    """
    model.eval()

    def scored(part):
        contexts, streams = features(part) if features else trajectories(model, ids[part], autocast, device)
        targets = ids[part, 1:].to(device).long()
        if retrieval:
            read = ids[part, :-1].to(device).long(), contexts, streams
            return looked_up_scores(model, retrieval, *read, targets, autocast)
        with autocast():
            return linear_token_nll(model.hidden(contexts, streams), *model.output_weights(), targets)

    return map_parts(scored, len(ids), SEQUENCES_AT_A_TIME)


@torch.no_grad()
def looked_up_scores(model, retrieval, ids, contexts, streams, targets, autocast):
    """(Nats, hits, nats with retrieval), each [B, T], of targets; a text is a stream from its first id on.

    Args:
        ids, targets: int64 [B, T]. contexts, streams: what the model made of them.
    """
    tokens = max(1, LOOKED_UP_LOGITS // model.vocab_size)
    texts, length = max(1, tokens // ids.shape[1]), min(tokens, LOOKED_UP_LENGTH)
    rows = []
    for few in zip(*(each.split(texts) for each in (ids, contexts, streams, targets)), strict=True):
        past, scores = retrieval.start(len(few[0]), ids.device), []
        for read, *made, wanted in zip(*(each.split(length, 1) for each in few), strict=True):
            poll()
            with autocast():
                hidden = model.hidden(*made)
                logits = functional.linear(hidden, *model.output_weights()).float()
            nats = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
            probability, past = retrieval.read_logits(
                logits, read, past, wanted, hidden=hidden, contexts=made[0]
            )
            scores.append((nats.view_as(wanted), logits.argmax(-1) == wanted, -probability.log()))
        rows.append([torch.cat(each, 1) for each in zip(*scores, strict=True)])
    return tuple(torch.cat(each) for each in zip(*rows, strict=True))


def evaluate_prediction(model, ids, token_bytes, autocast, device, features=None, totals=lambda *sums: sums):
    """Next-token loss on samples.

    Args:
        token_bytes: UTF-8 bytes of each id [V]. features: as above.
        totals: function of several sums that adds those over other samples, which other processes evaluate.

    Returns:
        {"loss": nats a token, "ppl": its exponential, "acc": share of right argmaxes, "bpb": bits a byte}.
    """
    parts = token_scores(model, ids, autocast, device, features)
    return _prediction(parts, ids, token_bytes, totals)


def evaluate_retrieval(model, retrieval, ids, token_bytes, autocast, device):
    """The same figures, and {"loss_retrieval", "ppl_retrieval", "bpb_retrieval"} of one reading of samples.

    Samples that the retrieval was measured on, when it was fitted, count as they did then: its gate may have
    been fitted on them since.
    """
    parts = token_scores(model, ids, autocast, device, retrieval=retrieval)
    figures = _prediction([scores[:2] for scores in parts], ids, token_bytes, lambda *sums: sums)
    nats = torch.cat([scores[2].double().sum(1) for scores in parts]).tolist()
    held_out = retrieval.held_out or {}
    nats = [held_out.get(sample_digest(sample), read) for sample, read in zip(ids, nats, strict=True)]
    looked_up = loss_figures(sum(nats), ids[:, 1:].numel(), text_bytes(ids, token_bytes))
    return figures | {f"{name}_retrieval": value for name, value in looked_up.items()}


def _prediction(parts, ids, token_bytes, totals):
    sums = [torch.stack([nats.double().sum(), hits.double().sum()]).tolist() for nats, hits in parts]
    sums = torch.tensor(sums, dtype=torch.float64).view(-1, 2)  # the view: a process may own no sample
    nats, right, count, size = totals(*sums.sum(0).tolist(), ids[:, 1:].numel(), text_bytes(ids, token_bytes))
    return loss_figures(nats, count, size) | {"acc": right / count}


def loss_figures(nats, count, size):
    """{"loss", "ppl", "bpb"}, as above, of the nats of so many targets that stand for `size` bytes."""
    loss = nats / count
    perplexity = math.exp(min(loss, 700))  # fp64 ends at exp(709)
    return {"loss": loss, "ppl": perplexity, "bpb": nats / math.log(2) / size}


def sample_nats(model, ids, autocast, device, features=None):
    """Nats of each sample over all its targets, for paired comparisons: fp64 [B]. Features as above."""
    parts = token_scores(model, ids, autocast, device, features)
    return torch.cat([torch.empty(0, device=device), *(nats.double().sum(-1) for nats, _ in parts)])


def sample_digest(ids):
    """What a sample, ids [T+1], is known again by: a part of its SHA-256 (hex)."""
    return hashlib.sha256(ids.cpu().int().numpy().tobytes()).hexdigest()[:16]


def text_bytes(ids, token_bytes):
    """UTF-8 bytes of the text that the targets of samples stand for; token_bytes [V]: of each id."""
    return token_bytes[ids[:, 1:].cpu().long()].sum().item()


@torch.no_grad()
def evaluate_contexts(model, data, settings, device, progress=silent):
    """Rank, convergence and memory of the contexts on equally many training and validation tokens, in fp32.

    Args:
        settings: phase1_convergence_threshold and phase1_min_converged_ratio (newllm.config.Phase1Settings).
        progress: function of (label, total tokens) to a context manager, whose `update` gets the tokens done.

    Returns:
        Dict of floats and curves. er_train, er_val and er_ceiling: shares of C, over rank_tokens; spectrum:
        {rank: share of the sum of singular values}, of validation tokens; converged_ratio: after 10 cold
        sweeps; sweeps_to_convergence: None where it takes more than MAX_SWEEPS; sweeps_to_1_percent: cold
        ones until the error is below NEAR, None where NEAR_SWEEPS are too few; the others as in diagnostics.
    """
    model.eval()
    width, length = model.context_dim, data.val.shape[1] - 1
    count = max(1, min(math.ceil(RANK_TOKENS / length), len(data.train), len(data.val)))
    few, fewer = min(CURVE_SEQUENCES, count), min(EXPONENT_SEQUENCES, count)
    # Two trajectories, the sweeps, the second halves that the memory curve evaluates again, the exponent.
    total = 2 * count * length + few * (MAX_SWEEPS * length + length - length // 2 + 1)
    total += 2 * fewer * min(EXPONENT_TOKENS, length)
    with progress("contexts", total) as bar:

        def step(context, token):
            bar.update(context[..., 0].numel())
            return model.step(context, token)

        def probed(ids):
            embeddings = model.embed(ids[:count, :-1].to(device).long())
            return sequential(step, embeddings, width)[0], embeddings

        train, val = probed(data.train), probed(data.val)
        contexts, embeddings = (part[:few] for part in val)
        threshold = settings.phase1_convergence_threshold
        errors, converged = diagnostics.cold_start(step, embeddings, contexts, MAX_SWEEPS, threshold)
        memory = diagnostics.memory_curve(step, embeddings, contexts)
        first = embeddings[:fewer, :EXPONENT_TOKENS], contexts[:fewer, :EXPONENT_TOKENS]
        exponent = diagnostics.lyapunov_exponent(step, *first)
    sequences = embeddings[:NEAR_SEQUENCES], contexts[:NEAR_SEQUENCES]
    most = min(NEAR_SWEEPS, max(1, length // 2))
    nearer, _ = diagnostics.cold_start(model.step, *sequences, most, until=NEAR)
    enough = [share >= settings.phase1_min_converged_ratio for share in converged]
    capacity = diagnostics.past_capacity(train, val)
    tokens = min(RANK_TOKENS, count * length)  # as many of both sides: a rank depends on their number
    spectra = [diagnostics.spectrum(contexts.flatten(0, 1)[:tokens]) for contexts, _ in (train, val)]
    shares = spectra[1].tolist()
    ranks = sorted({round(1 + i * (width - 1) / SPECTRUM_POINTS) for i in range(SPECTRUM_POINTS + 1)})
    return {
        "er_train": diagnostics.rank_of(spectra[0]) / width,
        "er_val": diagnostics.rank_of(spectra[1]) / width,
        "er_ceiling": diagnostics.effective_rank_ceiling(tokens, width) / width,
        "rank_tokens": tokens,
        "converged_ratio": converged[9],
        "sweeps_to_convergence": enough.index(True) + 1 if any(enough) else None,
        "cold_start_error_10": errors[9],
        "cold_start_curve": errors,
        "contraction": diagnostics.contraction_factor(errors),
        "lyapunov_exponent": exponent,
        "sweeps_to_1_percent": len(nearer) if nearer[-1] < NEAR else None,
        "memory_horizon": diagnostics.memory_horizon(memory),
        "memory_curve": memory,
        "past_capacity": sum(capacity),
        "past_capacity_by_lag": capacity,
        "spectrum": {rank: shares[rank - 1] for rank in ranks},
    }


@torch.no_grad()
def bpb_by_context(model, ids, token_bytes, autocast, device, progress=silent):
    """Bits per byte with contexts that are made of the last k tokens alone: k sweeps from a cold start.

    Where the curve is flat, what lies further back is not used, whatever a horizon says. The model has a
    `step`, and the first CURVE_SEQUENCES samples count.

    Returns:
        {k: bits per byte} for k = 1, 2, 4, ... below T, and T, where nothing is cut off.
    """
    model.eval()
    ids = ids[:CURVE_SEQUENCES]
    length = ids.shape[1] - 1
    cuts = [2**i for i in range((length - 1).bit_length())]

    def nats_of(part):
        """Of these samples, at each cut and without one."""
        ids_BT = ids[part].to(device).long()
        with autocast():
            tokens = model.embed(ids_BT[:, :-1])
            contexts, made = tokens.new_zeros(*tokens.shape[:2], model.context_dim), []
            for sweeps in range(1, cuts[-1] + 1):
                poll()
                contexts, streams = sweep(model.step, contexts, tokens)
                bar.update(ids_BT[:, 1:].numel())
                if sweeps in cuts:
                    made.append((contexts, streams))
            made.append(sequential(model.step, tokens, model.context_dim))
            hidden = [model.hidden(contexts, streams) for contexts, streams in made]
            scores = [linear_token_nll(h, *model.output_weights(), ids_BT[:, 1:])[0] for h in hidden]
        return [nats.double().sum().item() for nats in scores]

    with progress("bits per byte", len(ids) * length * cuts[-1]) as bar:
        nats = torch.tensor(map_parts(nats_of, len(ids), CURVE_SEQUENCES), dtype=torch.float64).sum(0)
    bits_per_byte = (nats / math.log(2) / text_bytes(ids, token_bytes)).tolist()
    return dict(zip([*cuts, length], bits_per_byte, strict=True))
