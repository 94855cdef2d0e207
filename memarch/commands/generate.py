"""`memarch generate`: the text that follows a prompt, on stdout as it comes. Bytes need no tokenizer; other models need theirs."""

import argparse
import sys
from typing import Any

from memarch.commands import load


def arguments(parser: argparse.ArgumentParser) -> None:
    load.arguments(parser)
    parser.add_argument("prompt", nargs="?", help="what to go on from (default: what comes in on stdin)")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="choose among this many")
    parser.add_argument("--top-p", type=float, help="choose among the most likely that together have this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", type=int, nargs="+", default=[], metavar="ID", help="token ids that end the text: 10 is a newline in bytes")
    parser.add_argument("--tokenizer", help="the tokenizer.json that `memarch prepare` was given, for a model that does not read bytes")


def run(args: argparse.Namespace) -> None:
    from memarch.config import require

    require(args.prompt is not None or not sys.stdin.isatty(), "no prompt: give one behind the model, or pipe it in.")
    prompt = sys.stdin.read() if args.prompt is None else args.prompt
    require(prompt != "", "the prompt is empty; a model needs at least one token to go on from.")
    model = load.load(args)
    how = {"max_new_tokens": args.tokens, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed, "stop": args.stop}
    if args.tokenizer is None:
        from memarch.generation import generate_text

        wide = model.config.vocab_size
        require(wide == 256, f"this model has {wide} tokens, so they are not bytes: name its tokenizer.json with --tokenizer.")
        pieces = generate_text(model, prompt, **how)  # refuses before anything is said
        say(prompt)
        for piece in pieces:
            say(piece)
    else:
        with_tokenizer(model, prompt, args.tokenizer, how)
    say("\n")


def say(text: str) -> None:
    print(text, end="", flush=True)


def with_tokenizer(model: Any, prompt: str, tokenizer: str, how: dict[str, Any]) -> None:
    """Says the text of all tokens so far minus what is said: a character may be spread over several tokens, and waits until it is whole."""
    from memarch.config import require
    from memarch.data.tokenizer import load as check
    from memarch.generation import generate

    require(tokenizer != "bytes", "--tokenizer takes a tokenizer.json; a model of bytes needs none.")
    check(tokenizer)  # says what is wrong with the file
    from tokenizers import Tokenizer

    coder = Tokenizer.from_file(tokenizer)
    tokens: list[int] = []
    said = ""

    def on_token(row: int, token: int) -> None:
        nonlocal said
        if not tokens:
            say(prompt)
        tokens.append(token)
        text = coder.decode(tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            say(text[len(said) :])
            said = text

    generate(model, [coder.encode(prompt, add_special_tokens=False).ids], on_token=on_token, **how)
