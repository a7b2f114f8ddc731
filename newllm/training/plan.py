"""What a run will do, stage by stage, as its settings come out for this model and its samples."""

from newllm.data.order import batch_count
from newllm.models.baselines import Baseline
from newllm.models.pretrained import adapter_rank
from newllm.training.runtime import memory_of


class Flops:
    """Floating-point operations a token, of matrix products alone, from the sizes of the network."""

    def __init__(self, config, vocab_size):
        width = config.context_dim + config.embed_dim
        self.map = 2 * config.num_layers * width**2
        self.contexts = self.map - 2 * config.embed_dim * width  # without the last layer's token stream
        self.covariance = 2 * config.context_dim**2
        self.head_first = 2 * config.token_layers * width**2
        self.head_rest = 2 * (config.token_layers * width * config.embed_dim + config.embed_dim * vocab_size)
        self.phase1 = 3 * (self.contexts + self.covariance)
        self.frozen = 2 * self.head_first + 3 * self.head_rest  # the gradient stops at the contexts
        # The trajectory once, then sweeps with gradient; the first sweep's gradient stops at its contexts.
        sweeps = config.gradient_sweeps
        through_time = (3 * sweeps - 2) * self.contexts + 3 * self.map if sweeps else 3 * self.map
        self.fine_tuned = through_time + 3 * (self.head_first + self.head_rest)
        self.generation = self.map + self.head_first + self.head_rest


def make_plan(config, num_samples, model, device):
    """The stages that train, in order.

    Args:
        num_samples: to train on. model: as it is before any training.

    Returns:
        {stage: {"passes" over the samples and "tokens" at most, "batches" of a pass, "samples" of the largest
        one, "asked" by the setting, "trainable" parameters, "work": operations a token}}.
    """
    context, head = _count(model.context_parameters()), _count(model.head_parameters())
    flops = None if isinstance(model, Baseline) else Flops(config, model.embedding.num_embeddings)
    frozen = config.freeze_context or not context
    plan = {}

    def add(stage, passes, asked, trainable, work):
        batches = batch_count(num_samples, asked, config.min_batches)
        plan[stage] = {
            "passes": passes,
            "tokens": passes * num_samples * config.max_seq_length,
            "batches": batches,
            "samples": -(-num_samples // batches),
            "asked": asked,
            "trainable": trainable,
            "work": work,
        }

    if context and config.untrained_control:
        trainable = head
        if model.output is not None and model.embedding.weight.requires_grad:
            # Untied, only the map reads the embedding, and there it is kept as it is.
            trainable -= model.embedding.weight.numel()
        add("untrained", config.phase2_epochs, config.phase2_batch_size, trainable, flops.frozen)
    if context and config.phase1_max_iterations:
        add("phase1", config.phase1_max_iterations, config.phase1_batch_size, context, flops.phase1)
    if config.phase == "both":
        if config.context_adapter != "none":
            rank = adapter_rank(config.adapter_rank, memory_of(device))
            mixes = [layer.mix for layer in model.context_map.layers]
            context = rank * sum(mix.in_features + mix.out_features for mix in mixes)
        trainable = head if frozen else head + context
        work = 1
        if flops:
            work = flops.frozen if frozen else flops.fine_tuned
        add("phase2", config.phase2_epochs, config.phase2_batch_size, trainable, work)
    return plan


def _count(parameters):
    return sum(parameter.numel() for parameter in parameters)
