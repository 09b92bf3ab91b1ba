"""How fast labelling and training are on this machine, and whether training withstands the killing of its workers.

This file imports nothing: the contenders are modules of this package, and start as fast as their libraries let them.
"""
