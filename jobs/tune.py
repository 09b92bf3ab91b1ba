"""Entry script that runs `catdog tune`: `ray job submit --working-dir . -- python -m jobs.tune ...`."""

import sys
from collections.abc import Sequence

from catdog import cli


def main(argv: Sequence[str]) -> int:
    """Run `catdog tune` with these arguments and return its exit code."""
    return cli.main(["tune", *argv])


if __name__ == "__main__":
    cli.leave(main(sys.argv[1:]))
