"""Entry script that runs `catdog tune`: `ray job submit --working-dir . -- python -m jobs.tune ...`."""

import sys

from catdog import cli

if __name__ == "__main__":
    cli.run(["tune", *sys.argv[1:]])
