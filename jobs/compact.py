"""Entry script that runs `catdog compact`: `ray job submit --working-dir . -- python -m jobs.compact ...`."""

import sys

from catdog import cli

if __name__ == "__main__":
    cli.run(["compact", *sys.argv[1:]])
