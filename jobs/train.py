"""Entry script that runs `catdog train`: `ray job submit --working-dir . -- python -m jobs.train ...`."""

import sys
from collections.abc import Sequence

from catdog import cli


def main(argv: Sequence[str]) -> int:
    """Run `catdog train` with these arguments and return its exit code."""
    return cli.main(["train", *argv])


if __name__ == "__main__":
    cli.leave(main(sys.argv[1:]))
