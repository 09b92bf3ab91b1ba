"""Entry script that runs `catdog predict`: `ray job submit --working-dir . -- python -m jobs.predict ...`."""

import sys

from catdog import cli

if __name__ == "__main__":
    cli.run(["predict", *sys.argv[1:]])
