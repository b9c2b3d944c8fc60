"""Pictures: `masks` and `curves` of a run. The command is `python -m ijepa_fast.view`, see `__main__`."""
