"""Entry script that runs `catdog evaluate`: `ray job submit --working-dir . -- python -m jobs.evaluate ...`."""

import sys
from collections.abc import Sequence

from catdog import cli


def main(argv: Sequence[str]) -> int:
    """Run `catdog evaluate` with these arguments and return its exit code."""
    return cli.main(["evaluate", *argv])


if __name__ == "__main__":
    cli.leave(main(sys.argv[1:]))
