"""Tuning: a search for the settings of a training that suit a dataset best.

Optuna suggests settings, Ray Tune trains with them, as many at a time as there is room for, and stops early those that
fall behind (ASHA). Each trial is a training as `catdog train` does it, in one process, of which only the figures are
kept. What is known of a trial is published when it ends, so that no finished trial is ever repeated.
"""

from catdog.tuning.search import TuneRecord, tune
from catdog.tuning.space import Space, resolved

__all__ = ["Space", "TuneRecord", "resolved", "tune"]
