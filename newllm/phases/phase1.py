"""Phase 1: train the context map so that parallel sweeps reach its trajectory and its contexts stay spread out.

Contexts K of all training samples are stored. One iteration is one sweep over all samples in random mini-batches:
K_new = G(K), loss, one optimizer step, K <- K_new. No label is used.
"""

import dataclasses
import functools
import math

import torch

from newllm.clock import timed
from newllm.data.order import batch_count, epoch_order, next_batch, order_digest
from newllm.fixed_point.diagnostics import effective_rank
from newllm.fixed_point.losses import phase1_loss
from newllm.fixed_point.solver import sequential, sweep
from newllm.progress import Progress
from newllm.saving.checkpoint import position_of
from newllm.seeding import derived_generator, derived_seed
from newllm.training.contexts import StoredContexts
from newllm.training.optim import copy_of, distance, make_optimizer, optimizer_state, prepare_optimizer
from newllm.training.runtime import StepFunction, memory_mb
from newllm.training.step import OptimizerStep

STAGE = "phase1"
SETTLE_ERROR = 1e-2  # relative distance from the trajectory at which contexts count as settled
SETTLE_SWEEPS = 32
VERIFIED_SEQUENCES = 32
RANK_TOKENS = 10_000


def train_phase1(model, data, config, runtime, log, checkpointer):
    """Train the context parameters of the model in place, from the checkpointer's state if it holds one of this stage.

    Returns:
        Dict of metrics: optimizer steps, relative parameter change, iterations, tok/s, settling.

    Raises:
        UserError: a loss or gradient that is not finite.
    """
    parameters = model.context_parameters()
    initial = copy_of(parameters)  # before restoring: the untrained network, a function of the seed
    saved = checkpointer.restore(STAGE, model)
    state = _fresh_state() | (saved or {})
    optimizer = make_optimizer([(parameters, 1.0)], config.phase1_learning_rate, weight_decay=0.0)
    optimizer = prepare_optimizer(runtime, optimizer, saved)
    if config.phase1_shuffle:
        data = shuffled(data, config.seed)
    group, contexts = runtime.group, StoredContexts(data, config, runtime, checkpointer.folder)
    if saved:
        contexts.restore(state.pop("contexts"), model, data, runtime, log.warn)
    history = checkpointer.history["phase1_history"]
    step = StepFunction(model.step, runtime.compile, model.cast_step, log.warn)
    take_step = OptimizerStep(runtime, optimizer, step, config.grad_clip, log.warn)
    count = len(data.train)
    batches = batch_count(count, config.phase1_batch_size, config.min_batches)
    earlier_seconds = state["seconds"]

    def position():
        return position_of(state["iteration"], config.phase1_max_iterations, state["samples"], count, batches)

    def save(**how):
        state["seconds"] = earlier_seconds + progress.seconds
        label = f"phase1_iteration_{state['iteration'] + (state['samples'] > 0)}"
        whole = state | {"contexts": contexts.state()} | optimizer_state(runtime, optimizer)
        checkpointer.save(label, model, whole, position=position(), before=contexts.sync, **how)

    def gradients_of(samples):
        """The batch's loss as a function of how it is cut into parts; what it returns besides: parts of the loss, contexts."""
        own = group.owned(samples)
        with timed("fetching rows"):
            ids = data.train[samples[own], :-1].to(runtime.device, non_blocking=True).long()
            old_bTC = contexts[samples[own]]

        def gradients(parts):
            start_bTC = old_bTC
            if config.context_noise:
                start_bTC = old_bTC + config.context_noise * torch.randn_like(old_bTC)

            def swept(part):
                with runtime.autocast():
                    contexts_alone = functools.partial(step.for_batch(), stream=False)
                    return sweep(contexts_alone, start_bTC[part], model.embed(ids[part], fixed=True))[0]

            def loss_of(new_BTC, old_BTC):
                loss, values = phase1_loss(
                    new_BTC,
                    old_BTC,
                    config.dist_reg_weight,
                    config.dist_reg,
                    config.phase1_convergence_threshold,
                    consistency=state["iteration"] > 0,
                )
                runtime.accelerator.backward(loss)
                return loss.detach().double(), values

            if len(parts) == group.size == 1:
                new_bTC = swept(parts[0])
                return *loss_of(new_bTC, old_bTC), new_bTC.detach()
            # The regularizer needs all contexts at once: their gradient first, then each part's (arXiv 2101.06983).
            with torch.no_grad():
                new_bTC = (
                    torch.cat([swept(part) for part in parts]) if len(own) else torch.empty_like(old_bTC)
                )
            new_BTC, old_BTC = (group.assemble(each, own, len(samples)) for each in (new_bTC, old_bTC))
            found = loss_of(new_BTC.requires_grad_(), old_BTC)
            gradient_bTC = new_BTC.grad[own]
            for part in parts:
                swept(part).backward(gradient_bTC[part])
            return *found, new_bTC.detach()

        return gradients

    model.train()
    with Progress(
        "phase 1", config.phase1_max_iterations * data.train[:, 1:].numel(), state["tokens"]
    ) as progress:
        while not _finished(state, history, config):
            order = epoch_order(count, config.seed, STAGE, state["iteration"])
            while state["samples"] < count:
                samples = next_batch(order, batches, state["samples"])
                last = state["samples"] + len(samples) == count
                before = copy_of(parameters) if last else None
                where = f"iteration {state['iteration'] + 1}, batch {position()['batch'] + 1} of Phase 1"
                seed = derived_seed(config.seed, STAGE, state["steps"])
                own_count = len(group.owned(samples))
                _, values, new_bTC = take_step(gradients_of(samples), own_count, state, seed, where)
                contexts[samples[group.owned(samples)]] = new_bTC
                _accumulate(state["sums"], values, len(samples) / count)
                state["sample_order"] = order_digest(state["sample_order"], samples)
                state["samples"] += len(samples)
                state["steps"] += 1
                state["tokens"] += len(samples) * config.max_seq_length
                progress.update(len(samples) * config.max_seq_length)
                log.status(progress, **checkpointer.arrived(STAGE, position(), state["steps"]))
                if (due := checkpointer.due(state["steps"])) and not last:
                    save()

            contexts.turn()
            ranked = contexts.first(min(count, math.ceil(RANK_TOKENS / config.max_seq_length)))
            row = state["sums"] | {
                "er": effective_rank(ranked.flatten(0, 1)[:RANK_TOKENS]) / model.context_dim,
                "grad_norm": state["grad_norm"],
                "update_norm": distance(parameters, before),
                "optimizer_steps": state["steps"] - state["skipped"],
                "tok_per_s": state["tokens"] / (earlier_seconds + progress.seconds),
            }
            state |= {"iteration": state["iteration"] + 1, "samples": 0, "sums": {}}
            for name, value in row.items():
                history.setdefault(name, []).append(value)
            log.log(STAGE, iteration=state["iteration"], **row, **memory_mb())
            log.say(
                f"phase 1 | iteration {state['iteration']:2d}/{config.phase1_max_iterations} | cvfp {row['cvfp']:.4f} | "
                f"{config.dist_reg} {row['dist_reg']:.4f} | converged {row['converged']:.1%} | ER {row['er']:.1%} | "
                f"grad {row['grad_norm']:.2g} | update {row['update_norm']:.2g} | steps {row['optimizer_steps']} | "
                f"{row['tok_per_s']:,.0f} tok/s"
            )
            save(names=["model_epoch.pt"], optional=not (due or contexts.in_files))
            if contexts.in_files:
                checkpointer.wait()  # the next iteration overwrites what the states before this one need
    model.eval()
    settled = _settle(model, data, contexts.first(min(count, VERIFIED_SEQUENCES)), runtime)
    contexts.close()
    return {
        "phase1_steps": state["steps"] - state["skipped"],
        "phase1_param_change": distance(parameters, initial) / distance(initial),
        "phase1_iterations": state["iteration"],
        "sample_order": state["sample_order"],
        "seconds_phase1": state["seconds"],
        "tok_per_s_phase1": state["tokens"] / max(state["seconds"], 1e-9),
        **settled,
    }


def _fresh_state():
    return {
        "iteration": 0, "samples": 0, "steps": 0, "skipped": 0, "tokens": 0, "seconds": 0.0, "sums": {}, "grad_norm": 0.0,
        "parts": 1, "sample_order": "",
    }  # fmt: skip


def shuffled(data, seed):
    """The data with the tokens of each training sample in random order: what a context can learn without any."""
    length = data.train.shape[1]
    keys = torch.rand(len(data.train), length, generator=derived_generator(seed, "shuffled tokens"))
    return dataclasses.replace(data, train=data.train.gather(1, keys.argsort(1)))


def _finished(state, history, config):
    if state["samples"]:
        return False
    if state["iteration"] and history["converged"][-1] >= config.phase1_min_converged_ratio:
        return True
    return state["iteration"] >= config.phase1_max_iterations


def _accumulate(sums, values, share):
    """Add a batch's values to the iteration's means, weighted by its share of the samples."""
    for name, value in zip(
        values, torch.stack([value.double() for value in values.values()]).tolist(), strict=True
    ):
        sums[name] = sums.get(name, 0.0) + share * value


@torch.no_grad()
def _settle(model, data, contexts_NTC, runtime):
    """Sweep stored contexts of the first samples on with the final weights until they are settled.

    Returns:
        {"settle_sweeps": sweeps needed to come within SETTLE_ERROR of the sequential reference, "settle_error": relative
        error then}.
    """
    embeddings = model.embed(data.train[: len(contexts_NTC), :-1].to(runtime.device).long())
    reference, _ = sequential(model.step, embeddings, model.context_dim)
    contexts = contexts_NTC.float()

    def error():
        return ((contexts - reference).norm() / reference.norm()).item()

    sweeps = 0
    while error() > SETTLE_ERROR and sweeps < SETTLE_SWEEPS:
        contexts, _ = sweep(model.step, contexts, embeddings)
        sweeps += 1
    return {"settle_sweeps": sweeps, "settle_error": error()}
