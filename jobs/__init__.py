"""Entry scripts for `ray job submit`. Each runs the command of `catdog.cli` that it is named after."""
