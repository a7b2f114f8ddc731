"""Text from a trained model.

    python3 -m scripts.generate --prompt "User: How do I boil an egg?"
    python3 -m scripts.generate --model_path checkpoints/model_best.pt --temperature 0   # greedy
    python3 -m scripts.generate --chat                                                   # a conversation

A model file (`checkpoints/DATA/models/TYPE_RUN.pth`) needs nothing else; a checkpoint needs its run's data or
cache, for the tokenizer. The text appears as it is drawn, in fp32: for one token, converting weights costs
more than using them.
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

TURN = "\nUser:"  # what an answer in a conversation ends before


def continued(model, tokenizer, prompt, options):
    """Texts that come one after the other and are together a continuation."""
    decode = tokenizer.decoder()
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    drawing = dict(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    for token in generate(model, ids, options.max_tokens, options.seed, **drawing, eos_id=tokenizer.eos_id):
        yield decode(token)
    yield decode()


def until(end, pieces):
    """The pieces as far as a text that ends them; what may be the beginning of that text has to wait."""
    waiting = ""
    for piece in pieces:
        waiting += piece
        if end in waiting:
            waiting = waiting.partition(end)[0]
            break
        if not any(waiting.endswith(end[:n]) for n in range(1, len(end))):
            yield waiting
            waiting = ""
    yield waiting


def write(pieces, in_conversation=False):
    """Print pieces as they come; returns their text. In a conversation Ctrl-C ends the answer alone."""
    text = ""
    with Interrupt() as interrupt:
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
                text += piece
        except Stopped:
            if not in_conversation or interrupt.signal != signal.SIGINT:
                raise
    print(flush=True)
    return text


def chat(continuation, turns):
    """A conversation: a line of the user's, an answer to all that was said, until the lines end."""
    history = ""
    for line in turns:
        history += f"User: {readable(line, 'this line').strip()}\nAssistant:"
        history += write(until(TURN, continuation(history)), in_conversation=True) + "\n"


def readable(text, what):
    """A text of the user's; UserError where Python has kept bytes that are not UTF-8."""
    try:
        return text.encode(errors="surrogateescape").decode()
    except UnicodeError:
        raise UserError(f"{what} is not UTF-8 text: {text!r}.") from None


def parse(arguments):
    """The flags."""
    parser = Parser(description=__doc__.splitlines()[0])

    def add(name, kind, bounds, default, text):
        convert = flag(name, kind, bounds)
        parser.add_argument(f"--{name}", type=convert, metavar=kind.__name__, default=default, help=text)

    folder = ResidualConfig().checkpoint_dir
    path = dict(type=expanded, help="a model file, a checkpoint or a folder of these", default=folder)
    parser.add_argument("--model_path", **path)
    parser.add_argument("--prompt", default="User:", help="text to continue")
    add("max_tokens", int, Range(1), 100, "length, at most")
    add("temperature", float, Range(0), 0.8, "0: always the likeliest token")
    add("top_k", int, Range(0), 0, "draw among so many likeliest tokens; 0: all")
    add("top_p", float, Range(0, 1, above=True), 0.9, "draw among the likeliest with this much together")
    add("seed", int, Range(0, 2**63 - 1), 0, "of the draws")
    cache = "folder of tokenized data, where it is not that of the run"
    parser.add_argument("--cache_dir", type=expanded, default="", help=cache)
    talk = "talk, a line at a time; the prompt is not used"
    parser.add_argument("--chat", action="store_true", help=talk)
    return parser.parse_args(arguments)


def main(arguments=None):
    """Write, or talk."""
    options = parse(arguments)
    prompt = readable(options.prompt, "--prompt")
    model, tokenizer, _ = open_model(options.model_path, options.cache_dir)
    if not options.chat:
        print(prompt, end="", flush=True)
        write(continued(model, tokenizer, prompt, options))
        return
    try:
        chat(lambda history: continued(model, tokenizer, history, options), sys.stdin)
    except KeyboardInterrupt:  # at the prompt, where nothing is to be saved
        print()
        raise SystemExit(130) from None


if __name__ == "__main__":
    with exit_on_user_error():
        main()
