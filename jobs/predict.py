"""Entry script that runs `catdog predict`: `ray job submit --working-dir . -- python -m jobs.predict ...`."""

import sys
from collections.abc import Sequence

from catdog import cli


def main(argv: Sequence[str]) -> int:
    """Run `catdog predict` with these arguments and return its exit code."""
    return cli.main(["predict", *argv])


if __name__ == "__main__":
    cli.leave(main(sys.argv[1:]))
