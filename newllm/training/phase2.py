"""Phase 2: next-token prediction on contexts, frozen (computed once) or fine-tuned (gradient through time)."""

import time

import torch

from newllm.clock import timed
from newllm.data.order import batch_at, batch_count, epoch_order, order_digest, quick_subset
from newllm.evaluate import evaluate_prediction, sample_nats
from newllm.fixed_point.solver import sequential, truncated
from newllm.interrupt import Stopped
from newllm.models.adapter import adapter_rank, add_adapter, has_adapter, merge_adapter
from newllm.models.baselines import Baseline
from newllm.models.cross_entropy import linear_cross_entropy
from newllm.progress import Progress
from newllm.seeding import derived_generator, derived_seed
from newllm.training.device import StepFunction, memory_mb, memory_of
from newllm.training.features import FrozenFeatures
from newllm.training.optim import make_optimizer, optimizer_state, prepare_optimizer, set_learning_rate, warmup_cosine
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
        add_adapter(model, adapter_rank(config, memory_of(runtime.device)), derived_generator(config.seed, "adapter"))
    parts = [(model.head_parameters(), 1.0)]
    if not freeze_context:
        parts.append((model.context_parameters(), config.context_lr_scale))
    for parameter in model.context_parameters():
        parameter.requires_grad_(not freeze_context)
    optimizer = make_optimizer(parts, config.phase2_learning_rate, config.weight_decay)
    optimizer = prepare_optimizer(runtime, optimizer, saved)
    history = checkpointer.history["phase2_history"] if stage == "phase2" else state["history"]
    baseline = isinstance(model, Baseline)
    step = StepFunction(model.encode if baseline else model.step, runtime.compile)
    take_step = OptimizerStep(runtime, optimizer, step, config.grad_clip, log.warn)
    batches = batch_count(len(data.train), config.phase2_batch_size, config.min_batches)
    total_steps = batches * config.phase2_epochs
    quick = quick_subset(len(data.val), config.val_quick_frac, config.seed)
    earlier_seconds = state["seconds"]
    group = runtime.group
    features = FrozenFeatures(model, data, config, runtime, checkpointer.folder) if freeze_context else None

    def save(**how):
        state["seconds"] = earlier_seconds + progress.seconds
        label = f"{stage}_epoch_{state['epoch'] + (state['batch'] > 0)}"
        checkpointer.save(label, model, state | optimizer_state(runtime, optimizer), best, **how)

    def gradients_of(samples):
        """The batch's loss as a function of how it is cut into parts."""
        own = samples[group.owned(samples)]
        with timed("fetching rows"):
            ids = data.train[own].to(runtime.device).long()

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
            if config.gradient_sweeps:
                sizes = model.context_dim, config.gradient_sweeps
                return truncated(step, embeddings, *sizes, step.contexts, step.trajectory)
            return sequential(step, embeddings, model.context_dim)

        def part_gradients(part):
            with runtime.autocast():
                hidden = model.hidden(*encoded(part))
                loss = linear_cross_entropy(hidden, *model.output_weights(), ids[part, 1:])
            loss = loss * (len(ids[part]) / len(samples))
            runtime.accelerator.backward(loss)
            return loss.item()

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

    best = checkpointer.load_best(stage) if state["best"] else None
    if best:  # a run killed between the two files has a newer best than its state, which is as true
        state["best"] = best["metrics"]
    model.train()
    with Progress(stage, config.phase2_epochs * data.train[:, 1:].numel(), state["tokens"]) as progress:
        while not _finished(state, config):
            order = epoch_order(len(data.train), config.seed, stage, state["epoch"])
            while state["batch"] < batches:
                samples, last = batch_at(order, batches, state["batch"]), state["batch"] + 1 == batches
                set_learning_rate(optimizer, warmup_cosine(state["steps"], total_steps, config.warmup_ratio))
                where = f"epoch {state['epoch'] + 1}, batch {state['batch'] + 1} of {stage}"
                seed = derived_seed(config.seed, stage, state["steps"])
                own_count = len(group.owned(samples))
                (loss,) = take_step(gradients_of(samples), own_count, state, seed, where)
                state["train_loss"] += loss * len(samples) / len(data.train)
                state["sample_order"] = order_digest(state["sample_order"], samples)
                state["batch"] += 1
                state["steps"] += 1
                state["tokens"] += len(samples) * config.max_seq_length
                progress.update(len(samples) * config.max_seq_length)
                log.status(
                    progress,
                    stage=stage,
                    epoch=state["epoch"] + 1,
                    epochs=config.phase2_epochs,
                    batch=state["batch"],
                    batches=batches,
                    saved_at=checkpointer.saved_at,
                    best_val_loss=state["best"] and state["best"]["loss"],
                )
                if (
                    config.val_quick_every_n_batches
                    and state["batch"] % config.val_quick_every_n_batches == 0
                    and not last
                ):
                    started = time.monotonic()
                    metrics = validate(quick)
                    log.log(
                        f"{stage}_quick",
                        steps=state["steps"],
                        samples=len(quick),
                        seconds=time.monotonic() - started,
                        **metrics,
                    )
                    log.say(
                        f"{stage} | batch {state['batch']}/{batches} | quick validation ({len(quick)}/{len(data.val)} "
                        f"samples, {time.monotonic() - started:.1f}s): loss {metrics['loss']:.4f}"
                    )
                if checkpointer.due(state["steps"]) and not last:
                    save()

            started = time.monotonic()
            metrics = validate(torch.arange(len(data.val)))
            row = {"train_loss": state["train_loss"]} | {f"val_{name}": value for name, value in metrics.items()}
            for name, value in row.items():
                history.setdefault(name, []).append(value)
            state |= {"epoch": state["epoch"] + 1, "batch": 0, "train_loss": 0.0}
            log.log(stage, epoch=state["epoch"], optimizer_steps=state["steps"] - state["skipped"], grad_norm=state["grad_norm"],
                    tok_per_s=state["tokens"] / (earlier_seconds + progress.seconds), seconds_validation=time.monotonic() - started, **row,
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
            save(names=["model_epoch.pt"], optional=not _finished(state, config))
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
        "seconds": state["seconds"],
        "tok_per_s": state["tokens"] / state["seconds"],
    }


def _fresh_state():
    return {
        "epoch": 0, "batch": 0, "steps": 0, "skipped": 0, "tokens": 0, "seconds": 0.0, "train_loss": 0.0, "grad_norm": 0.0,
        "best": None, "history": {}, "parts": 1, "sample_order": "",
    }  # fmt: skip


def _finished(state, config):
    if state["batch"] or not state["epoch"]:
        return False
    return state["epoch"] >= config.phase2_epochs or state["epoch"] - state["best"]["epoch"] >= config.patience
