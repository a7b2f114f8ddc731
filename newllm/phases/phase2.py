"""Phase 2: next-token prediction on contexts, frozen (computed once) or fine-tuned (gradient through time)."""

import functools
import math
import time

import torch

from newllm.clock import timed
from newllm.data.order import (
    batch_count,
    batches_done,
    epoch_order,
    next_batch,
    order_digest,
    quick_check_due,
    quick_subset,
)
from newllm.evaluate import evaluate_prediction, sample_nats
from newllm.fixed_point.solver import sequential, truncated
from newllm.models.baselines import Baseline
from newllm.models.cross_entropy import linear_cross_entropy
from newllm.models.pretrained import adapter_rank, add_adapter, has_adapter, merge_adapter
from newllm.progress import Progress
from newllm.saving.checkpoint import position_of
from newllm.saving.stop import Stopped
from newllm.seeding import derived_generator, derived_seed
from newllm.training.features import FrozenFeatures
from newllm.training.optim import (
    make_optimizer,
    optimizer_state,
    prepare_optimizer,
    set_learning_rate,
    warmup_cosine,
)
from newllm.training.runtime import StepFunction, memory_mb, memory_of
from newllm.training.step import OptimizerStep


def train_phase2(model, data, config, runtime, log, checkpointer, stage, freeze_context):
    """Train the head, and F too unless frozen; the model ends with the weights of the lowest validation loss.

    Args:
        stage: "phase2", or "untrained" for the control: the same head on the untrained context map.

    Returns:
        Dict of metrics of the best epoch on the full validation set: loss, ppl, acc, bpb, and epoch, steps, tok_per_s.

    Raises:
        UserError: a loss or gradient that is not finite.
    """
    saved = checkpointer.restore(stage, model)
    state = _fresh_state() | (saved or {})
    adapted = config.context_adapter == "lora" and not freeze_context
    if adapted and not has_adapter(model.state_dict()):  # a restored state brings its own
        add_adapter(
            model, adapter_rank(config, memory_of(runtime.device)), derived_generator(config.seed, "adapter")
        )
    parts = [(model.head_parameters(), 1.0)]
    if not freeze_context:
        parts.append((model.context_parameters(), config.context_lr_scale))
    for parameter in model.context_parameters():
        parameter.requires_grad_(not freeze_context)
    optimizer = make_optimizer(parts, config.phase2_learning_rate, config.weight_decay)
    optimizer = prepare_optimizer(runtime, optimizer, saved)
    history = checkpointer.history["phase2_history"] if stage == "phase2" else state["history"]
    baseline = isinstance(model, Baseline)
    cast = None if baseline else model.cast_step
    step = StepFunction(model.encode if baseline else model.step, runtime.compile, cast, log.warn)
    take_step = OptimizerStep(runtime, optimizer, step, config.grad_clip, log.warn)
    count = len(data.train)
    batches = batch_count(count, config.phase2_batch_size, config.min_batches)
    total_steps = batches * config.phase2_epochs
    quick = quick_subset(len(data.val), config.val_quick_frac, config.seed)
    state["quick_subset"] = order_digest("", quick)[:12]
    earlier_seconds = state["seconds"]
    group = runtime.group
    features = FrozenFeatures(model, data, config, runtime, checkpointer.folder) if freeze_context else None

    def position():
        return position_of(state["epoch"], config.phase2_epochs, state["samples"], count, batches)

    def save(**how):
        state["seconds"] = earlier_seconds + progress.seconds
        label = f"{stage}_epoch_{state['epoch'] + (state['samples'] > 0)}"
        checkpointer.save(
            label, model, state | optimizer_state(runtime, optimizer), best, position=position(), **how
        )

    def gradients_of(samples):
        """The batch's loss as a function of how it is cut into parts."""
        own = samples[group.owned(samples)]
        with timed("fetching rows"):
            ids = data.train[own].to(runtime.device, non_blocking=True).long()

        def gradients(parts):
            loss = sum(part_gradients(part) for part in parts)
            return group.totals(loss)

        def encoded(part):
            """What the head reads, with gradient where the context trains."""
            if features:
                return features("train", own[part])
            if baseline:
                return step(ids[part, :-1])
            embeddings = model.token_dropout(model.embed(ids[part, :-1]))
            each = step.for_batch()
            if config.gradient_sweeps:
                how = config.gradient_sweeps, functools.partial(each, stream=False), step.trajectory
                return truncated(each, embeddings, model.context_dim, *how)
            return sequential(each, embeddings, model.context_dim)

        def part_gradients(part):
            with runtime.autocast():
                hidden = model.hidden(*encoded(part))
                loss = linear_cross_entropy(hidden, *model.output_weights(), ids[part, 1:])
            loss = loss * (len(ids[part]) / len(samples))
            runtime.accelerator.backward(loss)
            return loss.detach().double()

        return gradients

    @timed("validation")
    def validate(samples):
        own = samples[group.owned(samples)]
        held = (lambda part: features("val", own[part])) if features else None
        how = data.token_bytes, runtime.autocast, runtime.device, held, group.totals
        try:
            return evaluate_prediction(model, data.val[own], *how)
        except Stopped:
            save()
            raise
        finally:
            model.train()

    def quick_validation():
        """The fixed subset alone, within an epoch: an early sign, of no consequence for the training."""
        started = time.monotonic()
        metrics = validate(quick)
        seconds, full = time.monotonic() - started, state["seconds_validation"]
        about = dict(steps=state["steps"], samples=len(quick), subset=state["quick_subset"], seconds=seconds)
        log.log(f"{stage}_quick", **about, seconds_full=full, **metrics)
        whole = "the full one ends the epoch" if full is None else f"the last full one {full:.1f}s"
        log.say(
            f"{stage} | batch {position()['batch']}/{batches} | quick validation ({len(quick)}/{len(data.val)} samples, subset "
            f"{state['quick_subset']}, {seconds:.1f}s; {whole}): loss {metrics['loss']:.4f}"
        )

    best = checkpointer.load_best(stage) if state["best"] else None
    if best:  # a run killed between the two files has a newer best than its state, which is as true
        state["best"] = best["metrics"]
    model.train()
    with Progress(stage, config.phase2_epochs * data.train[:, 1:].numel(), state["tokens"]) as progress:
        while not _finished(state, config):
            order, due = epoch_order(count, config.seed, stage, state["epoch"]), False
            while (done := state["samples"]) < count:
                samples = next_batch(order, batches, done)
                # Steps as batches of this size would have taken them: the schedule ends with the run, whatever sizes there were.
                at = state["epoch"] * batches + batches_done(count, batches, done)
                set_learning_rate(optimizer, warmup_cosine(at, total_steps, config.warmup_ratio))
                where = f"epoch {state['epoch'] + 1}, batch {position()['batch'] + 1} of {stage}"
                seed = derived_seed(config.seed, stage, state["steps"])
                own_count = len(group.owned(samples))
                (loss,) = take_step(gradients_of(samples), own_count, state, seed, where)
                if not state["steps"]:
                    state["first_loss"] = float(loss)
                    log.say(
                        f"{stage} | loss of the first batch {state['first_loss']:.4f}: the head starts at the tokens' frequencies "
                        f"(all {data.vocab_size:,} tokens alike would be ln V = {math.log(data.vocab_size):.4f})"
                    )
                state["train_loss"] += loss * len(samples) / count
                state["sample_order"] = order_digest(state["sample_order"], samples)
                state["samples"] += len(samples)
                state["steps"] += 1
                state["tokens"] += len(samples) * config.max_seq_length
                progress.update(len(samples) * config.max_seq_length)
                best_loss = state["best"] and state["best"]["loss"]
                log.status(
                    progress,
                    **checkpointer.arrived(stage, position(), state["steps"]),
                    best_val_loss=best_loss,
                )
                if quick_check_due(count, batches, config.val_quick_every_n_batches, done, state["samples"]):
                    quick_validation()
                if (due := checkpointer.due(state["steps"])) and state["samples"] < count:
                    save()

            started = time.monotonic()
            metrics = validate(torch.arange(len(data.val)))
            state["seconds_validation"] = time.monotonic() - started
            row = {"train_loss": state["train_loss"]} | {
                f"val_{name}": value for name, value in metrics.items()
            }
            for name, value in row.items():
                history.setdefault(name, []).append(value)
            state |= {"epoch": state["epoch"] + 1, "samples": 0, "train_loss": 0.0}
            log.log(stage, epoch=state["epoch"], optimizer_steps=state["steps"] - state["skipped"], grad_norm=state["grad_norm"],
                    tok_per_s=state["tokens"] / (earlier_seconds + progress.seconds), seconds_validation=state["seconds_validation"], **row,
                    **memory_mb())  # fmt: skip
            log.say(
                f"{stage} | epoch {state['epoch']:2d}/{config.phase2_epochs} | train loss {row['train_loss']:.4f} | val loss "
                f"{row['val_loss']:.4f} ppl {row['val_ppl']:.1f} acc {row['val_acc']:.1%} bpb {row['val_bpb']:.3f} | "
                f"grad {state['grad_norm']:.2g} | steps {state['steps']} | "
                f"{state['tokens'] / (earlier_seconds + progress.seconds):,.0f} tok/s"
            )
            if not state["best"] or metrics["loss"] < state["best"]["loss"]:
                state["best"] = metrics | {"epoch": state["epoch"]}
                weights = {name: tensor.detach().clone() for name, tensor in model.trained_state().items()}
                best = {"metrics": state["best"], "weights": weights}
            save(names=["model_epoch.pt"], optional=not (due or _finished(state, config)))
    model.load_state_dict(model.frozen_state() | best["weights"])
    if adapted:
        merge_adapter(model)
    model.eval()
    own = group.owned_of(len(data.val))
    held = (lambda part: features("val", own[part])) if features else None
    nats = sample_nats(model, data.val[own], runtime.autocast, runtime.device, held)
    return state["best"] | {
        "sample_nats": group.assemble(nats.double(), own, len(data.val)).tolist(),
        "steps": state["steps"] - state["skipped"],
        "epochs": state["epoch"],
        "sample_order": state["sample_order"],
        "first_loss": state["first_loss"],
        "uniform_loss": math.log(data.vocab_size),
        "quick_subset": state["quick_subset"],
        "seconds": state["seconds"],
        "tok_per_s": state["tokens"] / state["seconds"],
    }


def _fresh_state():
    return {
        "epoch": 0, "samples": 0, "steps": 0, "skipped": 0, "tokens": 0, "seconds": 0.0, "train_loss": 0.0, "grad_norm": 0.0,
        "best": None, "history": {}, "parts": 1, "sample_order": "", "first_loss": None, "seconds_validation": None,
    }  # fmt: skip


def _finished(state, config):
    if state["samples"] or not state["epoch"]:
        return False
    return (
        state["epoch"] >= config.phase2_epochs or state["epoch"] - state["best"]["epoch"] >= config.patience
    )
