"""What a run will do, stage by stage, as its settings come out for this model and so many samples."""

from newllm.data.order import batch_count
from newllm.models.baselines import Baseline
from newllm.models.flops import Flops
from newllm.models.pretrained import adapter_rank
from newllm.training.runtime import memory_of


def make_plan(config, num_samples, model, device):
    """The stages that train, in order.

    Args:
        num_samples: to train on. model: as it is before any training.

    Returns:
        {stage: {"passes" over the samples and "tokens" at most, "batches" of a pass, "samples" of the largest one,
        "asked" by the setting, "trainable" parameters, "work": operations a token}}.
    """
    context, head = _count(model.context_parameters()), _count(model.head_parameters())
    plan = {}

    def add(stage, passes, asked, trainable, work):
        batches = batch_count(num_samples, asked, config.min_batches)
        tokens = passes * num_samples * config.max_seq_length
        sizes = {"batches": batches, "samples": -(-num_samples // batches), "asked": asked}
        plan[stage] = {"passes": passes, "tokens": tokens, **sizes, "trainable": trainable, "work": work}

    flops = None if isinstance(model, Baseline) else Flops(config, model.embedding.num_embeddings)
    if context and config.untrained_control:
        own = head - model.embedding.weight.numel() * (
            model.output is not None and model.embedding.weight.requires_grad
        )
        add("untrained", config.phase2_epochs, config.phase2_batch_size, own, flops.frozen)
    if context and config.phase1_max_iterations:
        add("phase1", config.phase1_max_iterations, config.phase1_batch_size, context, flops.phase1)
    if config.phase == "both":
        frozen = config.freeze_context or not context
        if config.context_adapter != "none":
            mixes = [layer.mix for layer in model.context_map.layers]
            context = adapter_rank(config, memory_of(device)) * sum(
                m.in_features + m.out_features for m in mixes
            )
        work = 1 if flops is None else flops.frozen if frozen else flops.fine_tuned
        trainable = head + context * (not frozen)
        add("phase2", config.phase2_epochs, config.phase2_batch_size, trainable, work)
    return plan


def _count(parameters):
    return sum(parameter.numel() for parameter in parameters)
