"""Arithmetic of each part of training, from the sizes of the network."""


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
        # Fine-tuned: the trajectory once, then sweeps with gradient; the first sweep's gradient stops at its contexts.
        sweeps = config.gradient_sweeps
        through_time = (3 * sweeps - 2) * self.contexts + 3 * self.map if sweeps else 3 * self.map
        self.fine_tuned = through_time + 3 * (self.head_first + self.head_rest)
        self.generation = self.map + self.head_first + self.head_rest
