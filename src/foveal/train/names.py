"""An unknown name is answered with the nearest known one."""

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist: what was given and the nearest known names, else all of them.

    >>> unknown("mixer", "transmx", ["cutmix", "transmix"])
    "unknown mixer 'transmx': did you mean 'transmix'?"
    >>> unknown("mixer", "blend", ["cutmix", "transmix"])
    "unknown mixer 'blend' (known: cutmix, transmix)"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"unknown {kind} {name!r}: did you mean {' or '.join(repr(near) for near in close)}?"
    return f"unknown {kind} {name!r}" + (f" (known: {', '.join(names)})" if len(names) <= 60 else "")
