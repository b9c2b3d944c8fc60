"""Which decoders there are, and what each needs installed."""
import pytest

DECODERS = ["pillow", "turbo", "dali"]
LIBRARIES = {"dali": "nvidia.dali"}


def need(decoder: str) -> None:
    """Skip the test where the decoder's library is not installed."""
    if decoder in LIBRARIES:
        pytest.importorskip(LIBRARIES[decoder], reason=f"{LIBRARIES[decoder]} is not installed")
