"""The version of the ops, which is that of the whole project."""
__version__ = "0.1.0"
