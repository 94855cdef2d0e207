"""`memarch convert`: a Mamba model of transformers or state-spaces as a folder that memarch loads, and the way back."""

import argparse

from memarch.commands.screen import count


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a folder with config.json and weights of transformers, state-spaces or memarch, or the file of the weights in it")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--to", choices=("memarch", "transformers"), default="memarch", help="whose layout to write (default: memarch)")


def run(args: argparse.Namespace) -> None:
    from memarch.commands.load import folder_of
    from memarch.convert import load, save_transformers

    model = load(folder_of(args.source))
    if args.to == "memarch":
        out = model.save_pretrained(args.out, card={"title": "A converted Mamba", "command": f"memarch convert {args.source} {args.out}"})
    else:
        out = save_transformers(model, args.out)
    config = model.config
    print(f"{out}: {count(config.num_params())} parameters, {config.layers} blocks of width {config.dim}, {config.vocab_size} tokens")
