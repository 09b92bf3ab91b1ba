"""Entry script that runs `catdog serve`: `ray job submit --working-dir . -- python -m jobs.serve ...`."""

import sys
from collections.abc import Sequence

from catdog import cli


def main(argv: Sequence[str]) -> int:
    """Run `catdog serve` with these arguments and return its exit code."""
    return cli.main(["serve", *argv])


if __name__ == "__main__":
    cli.leave(main(sys.argv[1:]))
