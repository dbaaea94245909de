"""Predictions that another program made, in place of a network. Imports no torch, as finding a cache complete needs none."""
