"""One file per command: `arguments(parser)` says what it takes, `run(args)` does it. What they share about the screen is in screen.py."""
