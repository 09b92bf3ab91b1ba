"""Entry script that runs `catdog prepare`: `ray job submit --working-dir . -- python -m jobs.prepare ...`."""

import sys
from collections.abc import Sequence

from catdog import cli


def main(argv: Sequence[str]) -> int:
    """Run `catdog prepare` with these arguments and return its exit code."""
    return cli.main(["prepare", *argv])


if __name__ == "__main__":
    cli.leave(main(sys.argv[1:]))
