"""`python -m catdog COMMAND` is `catdog COMMAND`."""

from catdog.cli import run

if __name__ == "__main__":
    run()
