"""`memarch warmup`: what would otherwise cost its time at first use, done now. Today that is the C++ for CPUs."""

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--print", action="store_true", help="say what is there, and build nothing")


def run(args: argparse.Namespace) -> int:
    from memarch.kernels import native

    if args.print:
        why = native.why_not()
        print(f"C++ kernels: {native.library() if why is None else why}")
        return 0
    try:
        print(f"C++ kernels: {native.build()}")
    except RuntimeError as error:
        print(error)
        return 1
    return 0
