"""newllm: a two-phase language model whose context is the fixed point of parallel sweeps."""

__version__ = "0.1.0"
