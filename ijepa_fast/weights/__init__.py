"""Weights in and out: one file a format; `load` recognises them and gives a `Model`."""
from ijepa_fast.weights.model import Model

__all__ = ["Model"]
