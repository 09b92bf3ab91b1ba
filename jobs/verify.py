"""Entry script that runs `catdog verify`: `ray job submit --working-dir . -- python -m jobs.verify ...`."""

import sys
from collections.abc import Sequence

from catdog import cli


def main(argv: Sequence[str]) -> int:
    """Run `catdog verify` with these arguments and return its exit code."""
    return cli.main(["verify", *argv])


if __name__ == "__main__":
    cli.leave(main(sys.argv[1:]))
