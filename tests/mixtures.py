"""Small transformers models: a network that nothing has trained, alone or with what it looks up."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch

from newllm.phases.retrieval import Reading, build
from newllm.retrieval.keys import PARTS, Keys
from newllm.retrieval.mixture import Retrieval
from newllm.transformers_model import NewLLMConfig, NewLLMForCausalLM

V = 50  # ids, of which a training text has those below 40
CONTEXT, EMBEDDING = 32, 24


def made(experts=(), window=4096, **settings):
    """A model of these settings, which looks up 20 random samples of 30 tokens if there are experts."""
    shape = dict(vocab_size=V, hidden_size=CONTEXT, embed_dim=EMBEDDING, num_hidden_layers=2) | settings
    model = NewLLMForCausalLM(NewLLMConfig(**shape)).eval()
    if not experts:
        return model
    samples = torch.randint(40, (20, 31), generator=torch.Generator().manual_seed(1))
    keys = Keys(PARTS, V, {"hidden": EMBEDDING, "contexts": CONTEXT})
    retrieval = Retrieval(experts, keys, V, window=window, neighbours=8)
    runtime = SimpleNamespace(autocast=nullcontext, device=torch.device("cpu"))
    build(retrieval, samples, Reading(model.network, samples, runtime))
    torch.nn.init.normal_(retrieval.gate.weight, generator=torch.Generator().manual_seed(2))
    mixture = NewLLMForCausalLM(NewLLMConfig(**shape, retrieval=retrieval.description())).eval()
    mixture.network.load_state_dict(model.network.state_dict())
    mixture.retrieval.load_state_dict(retrieval.state_dict())
    return mixture
