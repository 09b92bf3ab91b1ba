"""How fast catdog is on this machine, and whether it withstands the killing of its processes.

A module has the name of its command, and beside it stand those that only this command uses:

- `train`: `train_contenders`, `train_record`, `subset`
- `chaos`: `killer`, `watched`
- `nightly_chaos`: `disturbing`, `growing`, `opened`, `polling`, `runs`
- `plan`: `planning`, `simulated_s3`
- `predict`: `limit`, `peers`, `predict_record`
- `serve`: `serve_contenders`, `serve_record`
- `startup`

Several commands share `record` (what every record says), `rounds`, `processes` (how they are run), `tree` (what they
use), `folders` (what they are given, and leave behind), and `background` (threads).

This file imports nothing: the contenders are modules of this package, and start as fast as their libraries let them.
"""
