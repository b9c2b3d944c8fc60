"""What libraries warn of while they decode an image (EXIF, palettes, sizes): caught, named, said once and counted.

Python shows a warning raw, on stderr, without the image's name, and once for each line of the library. Here it is kept
until somebody takes it: a run for its log, `--verify` for its report, and of other commands the command line, at their
end. `warnings.catch_warnings` would not do: it swaps what belongs to all threads, and decoders have several. Instead
there is one hook in `warnings.showwarning`, and each thread knows which image it is at. A warning that is raised while
the thread is at none goes on to the hook before ours.
"""
import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

IMAGES = 10  # that are named; the warnings on all others are counted, so nothing here grows with the data
MESSAGES = 10  # of one image, likewise


class _Thread(threading.local):
    def __init__(self) -> None:
        self.names: Callable[[int], str] = "image {} of a batch".format  # of what this thread gives to a decoder
        self.image: Callable[[], str] | None = None  # that it is at itself


class Taken(NamedTuple):
    """What was raised since the last time, in this process."""

    new: list[tuple[str, str]]  # image and what was said of it, in no two of these
    raised: int  # all


_thread = _Thread()
_lock = threading.RLock()  # what is freed inside may warn as well
_known: dict[str, set[str]] = {}  # messages by image, of one image more than are named
_taken = Taken([], 0)


@contextlib.contextmanager
def batch(names: Callable[[int], str]) -> Iterator[None]:
    """Inside, the images that this thread gives to a decoder have the names `names(position)`."""
    before, _thread.names = _thread.names, names
    try:
        yield
    finally:
        _thread.names = before


def names() -> Callable[[int], str]:
    """Those of `batch`, for a decoder to hand to threads of its own."""
    return _thread.names


@contextlib.contextmanager
def about(name: Callable[[], str]) -> Iterator[None]:
    """Inside, what this thread's libraries warn of is about the image `name()`, which is asked for only then."""
    _install()
    before, _thread.image = _thread.image, name
    try:
        yield
    finally:
        _thread.image = before


def unsaid() -> contextlib.AbstractContextManager[None]:
    """For reading a header: whoever decodes the image hears the same again, and is the one to say it."""
    return about(_unsaid)


def _unsaid() -> str:
    raise AssertionError("nobody asks for its name")


def take() -> Taken:
    """What has come since the last call. An image and a message are in one of the answers only."""
    global _taken
    with _lock:
        taken, _taken = _taken, Taken([], 0)
    return taken


def finish() -> list[str]:
    """Lines on what nobody has taken, for the end of a command; the next one begins anew."""
    lines = Account().add([take()])
    with _lock:
        _known.clear()
    return lines


@dataclass
class Account:
    """The warnings of a command so far. A run has those of all its ranks; one that is resumed begins anew."""

    raised: int = 0
    named: set[str] = field(default_factory=set)
    said: set[tuple[str, str]] = field(default_factory=set)
    full: bool = False

    def add(self, every: list[Taken]) -> list[str]:
        """Count what each process has taken. Lines on what is new; ranks meet the same image in different epochs."""
        lines = []
        for new, raised in every:
            self.raised += raised
            for image, message in new:
                if image in self.named or len(self.named) < IMAGES:
                    self.named.add(image)
                    if (image, message) not in self.said:
                        self.said.add((image, message))
                        lines.append(f"{image}: {message}")
                elif not self.full:
                    self.full = True
                    lines.append(f"warnings on more images than these {IMAGES} are only counted")
        return lines


def _note(name: Callable[[], str], message: str) -> None:
    global _taken
    # One more than are named, by which `Account` sees that there are more. Of a tar's member the name has to be read.
    image = name().encode(errors="backslashreplace").decode() if len(_known) <= IMAGES else None  # a path is bytes
    with _lock:
        _taken = _taken._replace(raised=_taken.raised + 1)
        # Asked again: another thread may have come first.
        if image in _known or (image is not None and len(_known) <= IMAGES):
            messages = _known.setdefault(image, set())
            if message not in messages and len(messages) < MESSAGES:
                messages.add(message)
                _taken.new.append((image, message))


def _install() -> None:
    """Again where it is gone: `catch_warnings`, anywhere, puts back at its end what was there at its beginning.

    What a library raises in the moment between the two goes the usual way.
    """
    if getattr(warnings.showwarning, "knows_images", False):
        return
    with _lock:
        if getattr(warnings.showwarning, "knows_images", False):  # by another thread
            return
        before = warnings.showwarning  # each hook has its own, since `catch_warnings` may put back an earlier hook

        def show(message: Any, category: Any, filename: str, *place: Any, **more: Any) -> None:
            if _thread.image is None:
                before(message, category, filename, *place, **more)
            elif _thread.image is not _unsaid:
                library = "Pillow" if "PIL" in filename.split(os.sep) else "a library"
                _note(_thread.image, f"{library} warns: {' '.join(str(message).split())}")

        show.knows_images = True  # type: ignore[attr-defined]
        warnings.showwarning = show
        # Else the second image's warning would count as the first one's, shown already.
        warnings.filterwarnings("always", module=r"PIL\.")
