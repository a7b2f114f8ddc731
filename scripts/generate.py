"""Text from a trained model.

    python3 -m scripts.generate --prompt "User: How do I boil an egg?"
    python3 -m scripts.generate --model_path checkpoints/model_best.pt --prompt "Once" --temperature 0     # greedy
    python3 -m scripts.generate --chat                                                                     # a conversation

A model file (`checkpoints/DATA/models/TYPE_RUN.pth`) needs nothing else; a checkpoint needs its run's data or cache, for
the tokenizer. The text appears as it is drawn.
"""

import argparse
import sys

from config import ResidualConfig
from newllm.errors import UserError, exit_on_user_error
from newllm.generate import generate
from newllm.interrupt import Interrupt
from newllm.training.trained import open_model


class Writer:
    """Continues texts with the model of a checkpoint, in fp32: for one token, converting weights costs more than using them."""

    def __init__(self, options):
        self.options = options
        self.model, self.tokenizer, _ = open_model(options.model_path, options.cache_dir)

    def write(self, prompt, stop=None):
        """Print a continuation as it comes, up to the text `stop`; returns it."""
        options, written, waiting = self.options, "", ""
        how = dict(
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, eos_id=self.tokenizer.eos_id
        )
        prompt_ids = self.tokenizer.encode(prompt) or [self.tokenizer.eos_id]
        decode = self.tokenizer.decoder()
        for token in generate(self.model, prompt_ids, options.max_tokens, options.seed, **how):
            waiting += decode(token)
            if stop and stop in waiting:
                waiting = waiting.partition(stop)[0]
                break
            # What may be the beginning of `stop` waits for its end.
            if not (stop and any(waiting.endswith(stop[:n]) for n in range(1, len(stop)))):
                print(waiting, end="", flush=True)
                written, waiting = written + waiting, ""
        print(waiting, flush=True)
        return written + waiting


def chat(writer, turns):
    """A conversation: a line of the user's, an answer, until the lines end."""
    history = ""
    for line in turns:
        history += f"User: {line.strip()}\nAssistant:"
        history += writer.write(history, stop="\nUser:") + "\n"


def main(arguments=None):
    """Write, or talk."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model_path", default=ResidualConfig().checkpoint_dir, help="a model file, a checkpoint or a folder of these"
    )
    parser.add_argument("--prompt", default="User:", help="text to continue")
    parser.add_argument("--max_tokens", type=int, default=100, help="length, at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="draw among so many likeliest tokens; 0: all")
    parser.add_argument(
        "--top_p", type=float, default=0.9, help="draw among the likeliest with this probability together"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--cache_dir", default="", help="folder of tokenized data, where it is not that of the run")
    parser.add_argument("--chat", action="store_true", help="talk, a line at a time; the prompt is not used")
    options = parser.parse_args(arguments)
    if options.temperature < 0 or options.top_k < 0 or not 0 < options.top_p <= 1 or options.max_tokens < 1:
        raise UserError("temperature and top_k are at least 0, top_p lies in (0, 1], max_tokens is at least 1.")
    with Interrupt():
        writer = Writer(options)
        if options.chat:
            chat(writer, sys.stdin)
        else:
            print(options.prompt, end="", flush=True)
            writer.write(options.prompt)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
