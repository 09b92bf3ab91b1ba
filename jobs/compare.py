"""Entry script that runs `catdog compare`: `ray job submit --working-dir . -- python -m jobs.compare ...`."""

import sys

from catdog import cli

if __name__ == "__main__":
    cli.run(["compare", *sys.argv[1:]])
