"""Entry script that runs `catdog demo`: `python -m jobs.demo ...`."""

import sys

from catdog import cli

if __name__ == "__main__":
    cli.run(["demo", *sys.argv[1:]])
