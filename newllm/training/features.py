"""What the head reads when the context map no longer changes: computed once, kept for each sample.

Shapes: B sequences, T tokens, C context width, E embedding width.
"""

import torch

from newllm.evaluate import SEQUENCES_AT_A_TIME, trajectories
from newllm.fixed_point.losses import covariance
from newllm.training.sample_store import SampleStore

WHITENING_FLOOR = 1e-3  # of the mean variance: directions with less are left as small as they are
WHITENING_TOKENS = 100_000


class FrozenFeatures:
    """Contexts and token streams of this process's own training and validation samples.

    Args:
        model, data, config, runtime: of the run. folder: where files lie if features take more than `context_memory_mb`.
    """

    def __init__(self, model, data, config, runtime, folder):
        self.widths = [model.context_dim, model.embed_dim]
        self.size = runtime.group.size
        self._stores = {}
        for name, ids in (("train", data.train), ("val", data.val)):
            own = ids[runtime.group.owned_of(len(ids))]
            self._stores[name] = _stored(model, own, config, runtime, folder)
        if config.whiten_context:
            self._whiten(config.max_seq_length)

    def __call__(self, name, samples):
        """(contexts [B, T, C], streams [B, T, E]) of own samples of "train" or "val" [B]."""
        return self._stores[name][samples // self.size].split(self.widths, dim=-1)

    def _whiten(self, length):
        """Contexts of covariance I, by the symmetric root of their covariance over training tokens (ZCA)."""
        first = torch.arange(min(len(self._stores["train"]), -(-WHITENING_TOKENS // length)))
        contexts = self._stores["train"][first].split(self.widths, dim=-1)[0].flatten(0, 1).double()
        covariances = covariance(contexts).cpu()  # see spectrum
        mean, variances, directions = (
            contexts.mean(0),
            *(x.to(contexts.device) for x in torch.linalg.eigh(covariances)),
        )
        scale = (variances + WHITENING_FLOOR * variances.mean()).rsqrt()
        whiten = directions * scale @ directions.T
        for store in self._stores.values():
            for part in torch.arange(len(store)).split(SEQUENCES_AT_A_TIME):
                old, streams = store[part].split(self.widths, dim=-1)
                new = ((old.double() - mean) @ whiten).to(old.dtype)
                store[part] = torch.cat([new, streams], -1)


def _stored(model, ids, config, runtime, folder):
    """[c_t; u_t] of samples [B, T+1], rows [T, C + E]; in a file where they would take too much memory."""
    shape = config.max_seq_length, model.context_dim + model.embed_dim
    size = len(ids) * shape[0] * shape[1] * runtime.storage_dtype.itemsize
    place = folder if size > config.context_memory_mb * 1e6 else None
    store = SampleStore(len(ids), shape, runtime.storage_dtype, runtime.device, place)
    for part in torch.arange(len(ids)).split(SEQUENCES_AT_A_TIME):
        made = trajectories(model, ids[part], runtime.autocast, runtime.device, runtime.storage_dtype)
        store[part] = torch.cat(made, -1)
    return store
