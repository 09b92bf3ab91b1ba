"""Entry script that runs `catdog train`: `ray job submit --working-dir . -- python -m jobs.train ...`."""

import sys

from catdog import cli

if __name__ == "__main__":
    cli.run(["train", *sys.argv[1:]])
