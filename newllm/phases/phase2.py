"""Phase 2: next-token prediction on contexts, frozen (computed once) or fine-tuned (gradient through time).

Shapes: B samples in a batch, b of them on this process, T tokens, C context width, E embedding width.
"""

import functools
import math

import torch

from newllm.evaluate import evaluate_prediction, sample_nats
from newllm.fixed_point.solver import sequential, truncated
from newllm.models.baselines import Baseline
from newllm.models.cross_entropy import linear_cross_entropy
from newllm.models.pretrained import adapter_rank, add_adapter, merge_adapter, saved_rank
from newllm.phases.retrieval import Averaged
from newllm.retrieval.ngram import KneserNey
from newllm.saving.stop import poll
from newllm.seeding import derived_generator
from newllm.training.contexts import FrozenFeatures

SAMPLES_AT_A_TIME = 32  # whose targets are drawn together
FOLDS = 5  # of the training samples, each counted by the others: in its own counts a text is certain
DRAWS = 16  # tokens that stand in an epoch for what is predicted at a place; few are as noise
TAUGHT_EPOCHS = 4  # whose draws are made together from teachers, and used in turn


def counted_targets(samples, vocab_size, generator):
    """What counting, of the other samples, would put at each place of samples [N, T+1]: ids [N, T, DRAWS].

    Smoothing by n-grams (Malagutti et al. 2024, arXiv 2403.17240): a share of each target follows Kneser-Ney
    where label smoothing spreads it evenly. Draws stand for the distribution, so nothing has the size of V.
    """
    numbers, length = torch.arange(len(samples)), samples.shape[1] - 1
    drawn = torch.empty(len(samples), length, DRAWS, dtype=torch.int32)
    for fold in range(FOLDS):
        counts = KneserNey(5, vocab_size).fit(samples[numbers % FOLDS != fold].numpy())
        for part in numbers[fold::FOLDS].split(SAMPLES_AT_A_TIME):
            poll()
            ids = samples[part, :-1].long()
            drawn[part] = counts.draw(counts.contexts(ids), DRAWS, generator).int()
    return drawn


def taught_targets(teachers, samples, runtime, generator):
    """What models would put there on average, as ids [N, T, TAUGHT_EPOCHS * DRAWS].

    Distillation of an ensemble (Hinton et al. 2015, arXiv 1503.02531; for little data Kim et al. 2025, arXiv
    2509.14786), by draws as above.
    """
    reading, drawn = Averaged(teachers, samples, runtime), []
    for first in range(0, len(samples), SAMPLES_AT_A_TIME):
        poll()
        made = reading(slice(first, first + SAMPLES_AT_A_TIME))
        shares = reading.logits(made["hidden"]).softmax(-1).cpu()
        ids = torch.multinomial(shares.flatten(0, 1), TAUGHT_EPOCHS * DRAWS, True, generator=generator)
        drawn.append(ids.view(*shares.shape[:2], -1).int())
    return torch.cat(drawn)


class Phase2:
    """What an epoch of Phase 2 is: newllm.training.loop trains the head by it, and F too unless frozen.

    Args:
        model: LanguageModel, or Baseline, which trains end to end.
        data: samples `train` [N, T+1] and `val` [M, T+1], and the UTF-8 bytes of each id, `token_bytes` [V].
        settings: newllm.config.Phase2Settings. runtime: of the run.
        folder: where frozen features lie that take more than `context_memory_mb`.
        stage: "phase2", or "untrained" for the control: the same head on the untrained context map.
        freeze_context: whether the contexts stay as they are.

    Attributes:
        teachers: models that have a share of the targets, in place of counting.
    """

    counter = "epoch"
    contexts = None
    teachers = ()

    def __init__(self, model, data, settings, runtime, folder, stage, freeze_context):
        self.model = model
        self.data = data
        self.settings = settings
        self.runtime = runtime
        self.folder = folder
        self.stage = self.title = stage
        self.frozen = freeze_context
        self.train, self.num_validation = data.train, len(data.val)
        self.epochs = settings.phase2_epochs
        self.batch_size = settings.phase2_batch_size
        self.learning_rate = settings.phase2_learning_rate
        self.weight_decay = settings.weight_decay
        self.warmup_ratio = settings.warmup_ratio
        self.quick_share = settings.val_quick_frac
        self.quick_every = settings.val_quick_every_n_batches
        self.adapted = settings.context_adapter == "lora" and not freeze_context
        self.baseline = isinstance(model, Baseline)
        self.function = model.encode if self.baseline else model.step
        self.cast = None if self.baseline else model.cast_step
        self.features = self.drawn = None
        self.drawn_for = None  # the epoch, or with teachers the group of epochs, whose targets these are

    def begin(self):
        """Let the right parameters train; compute what a frozen map gives the head."""
        model, settings = self.model, self.settings
        if self.adapted and not saved_rank(model.state_dict()):  # a restored state brings its own
            rank = adapter_rank(settings.adapter_rank, self.runtime.memory)
            add_adapter(model, rank, derived_generator(settings.seed, "adapter"))
        for parameter in model.context_parameters():
            parameter.requires_grad_(not self.frozen)
        if self.frozen:
            samples = {"train": self.data.train, "val": self.data.val}
            self.features = FrozenFeatures(model, samples, settings, self.runtime, self.folder)

    def parameter_groups(self):
        groups = [(self.model.head_parameters(), 1.0)]
        if not self.frozen:
            groups.append((self.model.context_parameters(), self.settings.context_lr_scale))
        return groups

    def gradients(self, step, batch, parts):
        """Gradients of the cross-entropy, a part of the batch at a time; (mean over all tokens, None)."""
        loss = sum(self._part_gradients(step, batch, part) for part in parts)
        (loss,) = self.runtime.group.totals(loss)
        return loss, None

    def _part_gradients(self, step, batch, part):
        with self.runtime.autocast():
            hidden = self.model.hidden(*self._encoded(step, batch, part))
            targets = self._targets(batch, part)
            loss = linear_cross_entropy(hidden, *self.model.output_weights(), *targets)
        loss = loss * (len(hidden) / len(batch.samples))
        self.runtime.accelerator.backward(loss)
        return loss.detach().double()

    def _targets(self, batch, part):
        """What the loss asks for: the ids [b, T], or several at each place [b, T, S] and their shares."""
        targets, share = batch.ids[part, 1:], self.settings.label_smoothing
        if not share:
            return (targets,)
        drawn = self._drawn_targets(batch.epoch)[batch.own_samples[part]]
        shares = torch.full([1 + DRAWS], share / DRAWS, device=targets.device)
        shares[0] = 1 - share
        drawn = drawn.to(targets.device, non_blocking=True)
        return torch.cat([targets[..., None], drawn], -1), shares

    def _drawn_targets(self, epoch):
        """Ids [N, T, DRAWS] of an epoch, a function of the seed, so that a run goes on with the same."""
        made_for = epoch // TAUGHT_EPOCHS if self.teachers else epoch
        if self.drawn_for != made_for:
            generator = derived_generator(self.settings.seed, f"{self.stage} targets", made_for)
            if self.teachers:
                self.drawn = taught_targets(self.teachers, self.train, self.runtime, generator)
            else:
                self.drawn = counted_targets(self.train, self.model.vocab_size, generator)
            self.drawn_for = made_for
        turn = epoch % TAUGHT_EPOCHS if self.teachers else 0
        return self.drawn[..., turn * DRAWS : (turn + 1) * DRAWS]

    def _encoded(self, step, batch, part):
        """What the head reads: (contexts [b, T, C], streams [b, T, E]), with gradient where F trains."""
        if self.features:
            return self.features("train", batch.own_samples[part])
        model, sweeps, ids = self.model, self.settings.gradient_sweeps, batch.ids[part, :-1]
        if self.baseline:
            return step(ids)
        tokens = model.token_dropout(model.embed(ids))
        cast_step = step.for_batch()
        if not sweeps:
            return sequential(cast_step, tokens, model.context_dim)
        trajectory = step.trajectory(tokens, tokens.new_zeros(len(tokens), model.context_dim))
        contexts_alone = functools.partial(cast_step, stream=False)
        return truncated(cast_step, tokens, trajectory, sweeps, contexts_alone)

    def after_step(self, batch, loss, made):
        """The batch's loss, weighted by its share of the samples."""
        return {"train_loss": loss * len(batch.samples) / len(self.train)}

    def validate(self, samples):
        """Loss, perplexity, accuracy and bits per byte on validation samples, over all processes."""
        runtime = self.runtime
        own = samples[runtime.group.owned(samples)]
        return evaluate_prediction(
            self.model,
            self.data.val[own],
            self.data.token_bytes,
            runtime.autocast,
            runtime.device,
            self._features_of(own),
            runtime.group.totals,
        )

    def _features_of(self, own):
        """Function of a slice of own validation samples that gives what the head reads; None: not at hand."""
        if self.features is None:
            return None
        return lambda part: self.features("val", own[part])

    def end_epoch(self, means, metrics, figures):
        """The row of an epoch."""
        return means | {f"val_{name}": value for name, value in metrics.items()}

    def line(self, epoch, row, figures):
        """One line about an epoch."""
        return (
            f"{self.stage} | epoch {epoch:2d}/{self.epochs} | train loss {row['train_loss']:.4f} | "
            f"val loss {row['val_loss']:.4f} ppl {row['val_ppl']:.1f} acc {row['val_acc']:.1%} "
            f"bpb {row['val_bpb']:.3f} | grad {figures['grad_norm']:.2g} | "
            f"steps {figures['optimizer_steps']} | {figures['tok_per_s']:,.0f} tok/s"
        )

    def enough(self, state, history):
        """Whether the validation loss has stopped falling."""
        return state.best is not None and state.epoch - state.best["epoch"] >= self.settings.patience

    def results(self, state):
        """Metrics of the best epoch on all validation samples, the nats of each, and what training took."""
        if self.adapted:
            merge_adapter(self.model)
        data, runtime = self.data, self.runtime
        own = runtime.group.owned(torch.arange(len(data.val)))
        nats = sample_nats(
            self.model, data.val[own], runtime.autocast, runtime.device, self._features_of(own)
        )
        return state.best | {
            "sample_nats": runtime.group.assemble(nats.double(), own, len(data.val)).tolist(),
            "steps": state.steps - state.skipped,
            "epochs": state.epoch,
            "sample_order": state.sample_order,
            "first_loss": state.first_loss,
            "uniform_loss": math.log(self.model.vocab_size),
            "quick_subset": state.quick_subset,
            "seconds": state.seconds,
            "tok_per_s": state.tokens / state.seconds,
        }
