"""Weights in and out: one file a format. `load` recognises them and gives a model."""
