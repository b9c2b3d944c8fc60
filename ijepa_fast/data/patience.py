"""Errors of a storage that pass, and the patience with them."""
import errno
import time
from collections.abc import Callable
from typing import TypeVar

# What a network file system says while it recovers. Other errors (no such file, no permission) are final.
PASSING = {errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY, errno.ENETDOWN, errno.ENETUNREACH,
           errno.EHOSTDOWN, errno.ECONNRESET, errno.EREMOTEIO}  # fmt: skip
WAITS_S = (0.1, 0.5, 2.0)  # before each further try
_Read = TypeVar("_Read")


def patiently(read: Callable[[], _Read]) -> _Read:
    """What `read` returns. An `OSError` that may pass is tried again after a while, three times, and then raised."""
    for wait in WAITS_S:
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING:
                raise
        time.sleep(wait)
    return read()
