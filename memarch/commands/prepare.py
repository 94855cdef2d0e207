"""`memarch prepare`: text files, folders and .jsonl into a folder of token shards."""

import argparse

from memarch.commands.screen import count


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", help="text files, folders of them, or .jsonl files with one document a line")
    parser.add_argument("--out", required=True, help="the folder to write; it must not exist")
    parser.add_argument("--tokenizer", default="bytes", help="'bytes', or the path of a tokenizer.json (default: bytes)")
    parser.add_argument("--shard-tokens", type=int, default=1 << 26, help="tokens of one file (default: 67108864)")
    parser.add_argument("--text-field", default="text", help="where a .jsonl line keeps its text (default: text)")
    parser.add_argument("--validation", type=float, default=0.01, help="share of the documents held out (default: 0.01)")


def run(args: argparse.Namespace) -> None:
    from memarch.data.prepare import prepare

    index = prepare(args.inputs, args.out, args.tokenizer, shard_tokens=args.shard_tokens, text_field=args.text_field, validation=args.validation)
    parts = ", ".join(f"{name}: {count(part.tokens)} tokens of {count(part.documents)} documents" for name, part in index.splits.items())
    print(f"{args.out}: {parts}; vocabulary {index.vocab_size}")
    print(f"Train on it with --data.train.kind shards --data.train.path {args.out} --model.vocab_size {index.vocab_size}")
