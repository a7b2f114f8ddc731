"""Text from a trained model.

    python3 -m scripts.generate --prompt "User: How do I boil an egg?"
    python3 -m scripts.generate --model_path checkpoints/model_best.pt --prompt "Once" --temperature 0     # greedy
    python3 -m scripts.generate --chat                                                                     # a conversation

A model file (`checkpoints/DATA/models/TYPE_RUN.pth`) needs nothing else; a checkpoint needs its run's data or cache, for
the tokenizer. The text appears as it is drawn.
"""

import signal
import sys

from config import ResidualConfig
from newllm.config import Range, expanded
from newllm.errors import UserError, exit_on_user_error
from newllm.flags import Parser, flag
from newllm.generate import generate
from newllm.saving.stop import Interrupt, Stopped
from newllm.saving.trained import open_model


class Writer:
    """Continues texts with the model of a checkpoint, in fp32: for one token, converting weights costs more than using them."""

    def __init__(self, options):
        self.options = options
        self.model, self.tokenizer, _ = open_model(options.model_path, options.cache_dir)

    def pieces(self, prompt):
        """Texts that come one after the other and are together a continuation."""
        options = self.options
        how = dict(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            eos_id=self.tokenizer.eos_id,
        )
        prompt_ids = self.tokenizer.encode(prompt) or [self.tokenizer.eos_id]
        decode = self.tokenizer.decoder()
        for token in generate(self.model, prompt_ids, options.max_tokens, options.seed, **how):
            yield decode(token)
        yield decode()

    def write(self, prompt, stop=None):
        """Print a continuation as it comes; returns it.

        Args:
            stop: in a conversation, the text before which it ends. There Ctrl-C ends the answer alone.
        """
        written, waiting = "", ""
        with Interrupt() as interrupt:
            try:
                for piece in self.pieces(prompt):
                    waiting += piece
                    if stop and stop in waiting:
                        waiting = waiting.partition(stop)[0]
                        break
                    # What may be the beginning of `stop` waits for its end.
                    if not (stop and any(waiting.endswith(stop[:n]) for n in range(1, len(stop)))):
                        print(waiting, end="", flush=True)
                        written, waiting = written + waiting, ""
            except Stopped:
                if not stop or interrupt.signal != signal.SIGINT:
                    raise
        print(waiting, flush=True)
        return written + waiting


def chat(writer, turns):
    """A conversation: a line of the user's, an answer, until the lines end."""
    history = ""
    for line in turns:
        history += f"User: {readable(line, 'this line').strip()}\nAssistant:"
        history += writer.write(history, stop="\nUser:") + "\n"


def readable(text, what):
    """A text of the user's, of which Python may have kept bytes that the locale does not know.

    Raises:
        UserError: the bytes are not UTF-8.
    """
    try:
        return text.encode(errors="surrogateescape").decode()
    except UnicodeError:
        raise UserError(f"{what} is not UTF-8 text: {text!r}.") from None


def main(arguments=None):
    """Write, or talk."""
    parser = Parser(description=__doc__.splitlines()[0])

    def add(name, kind, bounds, default, text):
        parser.add_argument(
            f"--{name}", type=flag(name, kind, bounds), metavar=kind.__name__, default=default, help=text
        )

    parser.add_argument(
        "--model_path",
        type=expanded,
        default=ResidualConfig().checkpoint_dir,
        help="a model file, a checkpoint or a folder of these",
    )
    parser.add_argument("--prompt", default="User:", help="text to continue")
    add("max_tokens", int, Range(1), 100, "length, at most")
    add("temperature", float, Range(0), 0.8, "0: always the likeliest token")
    add("top_k", int, Range(0), 0, "draw among so many likeliest tokens; 0: all")
    add(
        "top_p",
        float,
        Range(0, 1, above=True),
        0.9,
        "draw among the likeliest with this probability together",
    )
    add("seed", int, Range(0, 2**63 - 1), 0, "of the draws")
    parser.add_argument(
        "--cache_dir",
        type=expanded,
        default="",
        help="folder of tokenized data, where it is not that of the run",
    )
    parser.add_argument("--chat", action="store_true", help="talk, a line at a time; the prompt is not used")
    options = parser.parse_args(arguments)
    prompt = readable(options.prompt, "--prompt")
    writer = Writer(options)
    if not options.chat:
        print(prompt, end="", flush=True)
        writer.write(prompt)
        return
    try:
        chat(writer, sys.stdin)
    except KeyboardInterrupt:  # at the prompt, where nothing is to be saved
        print()
        raise SystemExit(130) from None


if __name__ == "__main__":
    with exit_on_user_error():
        main()
