"""Entry script that runs `catdog evaluate`: `ray job submit --working-dir . -- python -m jobs.evaluate ...`."""

import sys

from catdog import cli

if __name__ == "__main__":
    cli.run(["evaluate", *sys.argv[1:]])
