"""`python -m memarch` is the command `memarch`."""

from memarch.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
