"""Entry script that runs `catdog demo`: `python -m jobs.demo ...`."""

import sys
from collections.abc import Sequence

from catdog import cli


def main(argv: Sequence[str]) -> int:
    """Run `catdog demo` with these arguments and return its exit code."""
    return cli.main(["demo", *argv])


if __name__ == "__main__":
    cli.leave(main(sys.argv[1:]))
