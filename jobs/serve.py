"""Entry script that runs `catdog serve`: `ray job submit --working-dir . -- python -m jobs.serve ...`."""

import sys

from catdog import cli

if __name__ == "__main__":
    cli.run(["serve", *sys.argv[1:]])
