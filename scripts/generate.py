"""Text from a trained model.

    python3 -m scripts.generate --prompt "User: How do I boil an egg?"
    python3 -m scripts.generate --model_path checkpoints/model_best.pt --temperature 0   # greedy
    python3 -m scripts.generate --chat                                                   # a conversation

A model file (`checkpoints/DATA/models/TYPE_RUN.pth`) needs nothing else; a checkpoint needs its run's data or
cache, for the tokenizer. The text appears as it is drawn.
"""

import signal
import sys

from config import ResidualConfig
from newllm.config import Range, expanded
from newllm.errors import UserError, exit_on_user_error
from newllm.flags import Parser, flag
from newllm.generate import USUAL, generate
from newllm.saving.stop import Interrupt, Stopped
from newllm.saving.trained import open_model, open_retrieval

TURN = "\nUser:"  # what an answer in a conversation ends before
NUMBERS = {  # flag: type, bounds, default, help
    "max_tokens": (int, Range(1), 100, "length, at most"),
    "temperature": (float, Range(0), USUAL["temperature"], "0: always the likeliest token"),
    "top_k": (int, Range(0), USUAL["top_k"], "draw among so many likeliest tokens; 0: all"),
    "top_p": (float, Range(0, 1, above=True), USUAL["top_p"], "draw among the likeliest of this sum"),
    "seed": (int, Range(0, 2**63 - 1), 0, "of the draws"),
}


def write(pieces, end=""):
    """Print a text as it comes, as far as its end; returns it. With an end, Ctrl-C stops this text alone."""
    text, shown = "", 0
    with Interrupt() as interrupt:
        try:
            for piece in pieces:
                text += piece
                if end and end in text:
                    text = text.partition(end)[0]
                    break
                safe = max(shown, len(text) - len(end))  # what may be the beginning of the end has to wait
                print(text[shown:safe], end="", flush=True)
                shown = safe
        except Stopped:
            if not end or interrupt.signal != signal.SIGINT:
                raise
    print(text[shown:], flush=True)
    return text


def chat(continuation, lines):
    """A conversation: a line of the user's, an answer to all that was said, until the lines end."""
    history = ""
    for line in lines:
        history += f"User: {readable(line, 'this line').strip()}\nAssistant:"
        history += write(continuation(history), TURN) + "\n"


def readable(text, what):
    """A text of the user's; UserError where Python has kept bytes that are not UTF-8."""
    try:
        return text.encode(errors="surrogateescape").decode()
    except UnicodeError:
        raise UserError(f"{what} is not UTF-8 text: {text!r}.") from None


def main(arguments=None):
    """Write, or talk."""
    parser = Parser(description=__doc__.splitlines()[0])
    add, usual = parser.add_argument, ResidualConfig().checkpoint_dir
    add("--model_path", type=expanded, default=usual, help="a model file, a checkpoint or a folder of these")
    add("--prompt", default="User:", help="text to continue")
    for name, (kind, bounds, default, text) in NUMBERS.items():
        add(f"--{name}", type=flag(name, kind, bounds), metavar=kind.__name__, default=default, help=text)
    add("--cache_dir", type=expanded, default="", help="folder of tokenized data, if not that of the run")
    what = "none: the network alone, without what it looks up"
    add("--retrieval", choices=("model", "none"), default="model", help=what)
    add("--chat", action="store_true", help="talk, a line at a time; the prompt is not used")
    options = parser.parse_args(arguments)
    prompt = readable(options.prompt, "--prompt")
    model, tokenizer, content = open_model(options.model_path, options.cache_dir)
    retrieval = None
    if options.retrieval != "none":
        retrieval = open_retrieval(options.model_path, model, content)
    given = options.max_tokens, options.seed, options.temperature, options.top_k, options.top_p

    def continuation(text):
        """Pieces of text that come one after the other."""
        decode, end = tokenizer.decoder(), tokenizer.eos_id
        for token in generate(model, tokenizer.encode(text) or [end], *given, end, retrieval):
            yield decode(token)
        yield decode()

    if not options.chat:
        print(prompt, end="", flush=True)
        write(continuation(prompt))
        return
    try:
        chat(continuation, sys.stdin)
    except KeyboardInterrupt:  # at the prompt, where nothing is to be saved
        print()
        raise SystemExit(130) from None


if __name__ == "__main__":
    with exit_on_user_error():
        main()
