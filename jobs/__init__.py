"""One entry script per job for `ray job submit`: each calls `catdog.cli` with its command's name."""
