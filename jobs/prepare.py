"""Entry script that runs `catdog prepare`: `ray job submit --working-dir . -- python -m jobs.prepare ...`."""

import sys

from catdog import cli

if __name__ == "__main__":
    cli.run(["prepare", *sys.argv[1:]])
