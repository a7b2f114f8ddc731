"""Phase 1: train the context map so that sweeps reach its trajectory and its contexts stay spread out.

Contexts K of all training samples are stored. One iteration is one sweep over all samples in random
mini-batches: K_new = G(K), loss, one optimizer step, K <- K_new. No label is used.
Shapes: N samples, B of them in a batch (b of these on this process), T tokens, C context width.
"""

import functools
import math

import torch

from newllm.evaluate import RANK_TOKENS, trajectories
from newllm.fixed_point.diagnostics import effective_rank
from newllm.fixed_point.losses import phase1_loss
from newllm.fixed_point.solver import sequential, sweep
from newllm.seeding import derived_generator
from newllm.training.contexts import StoredContexts

SETTLE_ERROR = 1e-2  # relative distance from the trajectory at which contexts count as settled
SETTLE_SWEEPS = 32
VERIFIED_SEQUENCES = 32


class Phase1:
    """What an iteration of Phase 1 is: newllm.training.loop trains the context parameters by it.

    Args:
        model: the untrained LanguageModel, from which the parameters' change is measured.
        train: ids of the training samples [N, T+1].
        settings: newllm.config.Phase1Settings. runtime: of the run.
        folder: where contexts lie that take more than `context_memory_mb`.
    """

    stage, title, counter = "phase1", "Phase 1", "iteration"
    weight_decay, warmup_ratio = 0.0, None
    num_validation = 0

    def __init__(self, model, train, settings, runtime, folder):
        self.model = model
        self.train = shuffled(train, settings.seed) if settings.phase1_shuffle else train
        self.settings = settings
        self.runtime = runtime
        self.folder = folder
        self.epochs = settings.phase1_max_iterations
        self.batch_size = settings.phase1_batch_size
        self.learning_rate = settings.phase1_learning_rate
        self.function, self.cast = model.step, model.cast_step
        self.parameters = model.context_parameters()
        self.initial = copy_of(self.parameters)

    def begin(self):
        self.contexts = StoredContexts(
            len(self.train), self.model.context_dim, self.settings, self.runtime, self.folder
        )

    def parameter_groups(self):
        return [(self.parameters, 1.0)]

    def trajectories(self, samples):
        """Contexts [b, T, C] of samples [b], step by step by the weights as they are."""
        runtime = self.runtime
        ids = self.train[samples]
        return trajectories(self.model, ids, runtime.autocast, runtime.device, runtime.storage_dtype)[0]

    def gradients(self, step, batch, parts):
        """Gradients of the loss of one sweep over a batch, a part of it at a time.

        The regularizer needs all contexts of the batch at once. So where it is cut into parts, or shared by
        processes, there are two passes (gradient caching, Gao et al. 2021, arXiv 2101.06983): contexts
        without a graph, the loss's gradient in them, then each part once more, with a graph, to lead that
        gradient on to the parameters.

        Returns:
            (loss, (its parts {name: scalar}, new contexts [b, T, C])).
        """
        if batch.ends_epoch:
            self.before = copy_of(self.parameters)
        group, ids_bT = self.runtime.group, batch.ids[:, :-1]
        old_bTC = start_bTC = self.contexts[batch.own_samples]
        if self.settings.context_noise:
            start_bTC = old_bTC + self.settings.context_noise * torch.randn_like(old_bTC)

        def swept(part):
            with self.runtime.autocast():
                contexts_alone = functools.partial(step.for_batch(), stream=False)
                tokens = self.model.embed(ids_bT[part], fixed=True)
                return sweep(contexts_alone, start_bTC[part], tokens)[0]

        if len(parts) == group.size == 1:
            new_bTC = swept(parts[0])
            loss, values = self._backward(new_bTC, old_bTC, batch)
            return loss, (values, new_bTC.detach())
        with torch.no_grad():
            new_bTC = torch.cat([swept(part) for part in parts]) if parts else torch.empty_like(old_bTC)
        new_BTC = group.assemble(new_bTC, batch.own, len(batch.samples)).requires_grad_()
        old_BTC = group.assemble(old_bTC, batch.own, len(batch.samples))
        loss, values = self._backward(new_BTC, old_BTC, batch)
        gradient_bTC = new_BTC.grad[batch.own]
        for part in parts:
            swept(part).backward(gradient_bTC[part])
        return loss, (values, new_bTC.detach())

    def _backward(self, new_BTC, old_BTC, batch):
        weight, kind = self.settings.dist_reg_weight, self.settings.dist_reg
        threshold = self.settings.phase1_convergence_threshold
        # At first the stored contexts are zeros, which no map should come back to.
        loss, values = phase1_loss(new_BTC, old_BTC, weight, kind, threshold, consistency=batch.epoch > 0)
        self.runtime.accelerator.backward(loss)
        return loss.detach().double(), values

    def after_step(self, batch, loss, made):
        """K <- K_new; the batch's parts of the loss, weighted by its share of the samples."""
        values, new_bTC = made
        self.contexts[batch.own_samples] = new_bTC
        share = len(batch.samples) / len(self.train)
        amounts = torch.stack([value.double() for value in values.values()]).tolist()
        return {name: share * amount for name, amount in zip(values, amounts, strict=True)}

    def end_epoch(self, means, metrics, figures):
        """The row of an iteration: parts of the loss, rank of the contexts, how far the last step went."""
        self.contexts.turn()
        length = self.train.shape[1] - 1
        ranked = self.contexts.first(min(len(self.train), math.ceil(RANK_TOKENS / length)))
        rank = effective_rank(ranked.flatten(0, 1)[:RANK_TOKENS])
        moved = distance(self.parameters, self.before)
        self.before = None
        return means | {"er": rank / self.model.context_dim, "update_norm": moved} | figures

    def line(self, epoch, row, figures):
        """One line about an iteration."""
        return (
            f"phase 1 | iteration {epoch:2d}/{self.epochs} | cvfp {row['cvfp']:.4f} | "
            f"{self.settings.dist_reg} {row['dist_reg']:.4f} | converged {row['converged']:.1%} | "
            f"ER {row['er']:.1%} | grad {row['grad_norm']:.2g} | update {row['update_norm']:.2g} | "
            f"steps {row['optimizer_steps']} | {row['tok_per_s']:,.0f} tok/s"
        )

    def enough(self, state, history):
        """Whether the contexts have converged."""
        return state.epoch > 0 and history["converged"][-1] >= self.settings.phase1_min_converged_ratio

    def results(self, state):
        """Steps, relative change of the parameters, speed, and how far the contexts are from settled."""
        return {
            "phase1_steps": state.steps - state.skipped,
            "phase1_param_change": distance(self.parameters, self.initial) / distance(self.initial),
            "phase1_iterations": state.epoch,
            "sample_order": state.sample_order,
            "seconds_phase1": state.seconds,
            "tok_per_s_phase1": state.tokens / max(state.seconds, 1e-9),
            **self._settle(),
        }

    @torch.no_grad()
    def _settle(self):
        """Sweep stored contexts of the first samples on with the final weights until they are settled.

        Returns:
            {"settle_sweeps": sweeps needed to come within SETTLE_ERROR of the sequential reference,
            "settle_error": relative error then}.
        """
        contexts = self.contexts.first(min(len(self.train), VERIFIED_SEQUENCES)).float()
        tokens = self.model.embed(self.train[: len(contexts), :-1].to(self.runtime.device).long())
        reference, _ = sequential(self.model.step, tokens, self.model.context_dim)
        sweeps, size = 0, reference.norm()
        while (contexts - reference).norm() / size > SETTLE_ERROR and sweeps < SETTLE_SWEEPS:
            contexts, _ = sweep(self.model.step, contexts, tokens)
            sweeps += 1
        return {"settle_sweeps": sweeps, "settle_error": ((contexts - reference).norm() / size).item()}


@torch.no_grad()
def distance(parameters, others=None):
    """Euclidean distance between two lists of tensors; of one from zero."""
    others = others or [torch.zeros_like(p) for p in parameters]
    return torch.stack([(a - b).norm() for a, b in zip(parameters, others, strict=True)]).norm().item()


def copy_of(parameters):
    return [p.detach().clone() for p in parameters]


def shuffled(ids, seed):
    """Samples [N, T+1] with the tokens of each in random order: what can a context learn without any?"""
    keys = torch.rand(ids.shape, generator=derived_generator(seed, "shuffled tokens"))
    return ids.gather(1, keys.argsort(1))
