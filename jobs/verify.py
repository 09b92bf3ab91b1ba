"""Entry script that runs `catdog verify`: `ray job submit --working-dir . -- python -m jobs.verify ...`."""

import sys

from catdog import cli

if __name__ == "__main__":
    cli.run(["verify", *sys.argv[1:]])
