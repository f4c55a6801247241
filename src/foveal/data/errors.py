"""What can be wrong with data: an error where it cannot be used, a warning where part of it cannot."""


class DataError(ValueError):
    """The data given cannot be used; the message says what was found, what fits and what to try."""


class DataWarning(UserWarning):
    """The data given can be used, but not all of it or not as one may think."""


def listed(names: list[str], most: int = 5) -> str:
    """The first few names and how many more there are, for messages."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def counted(number: int, thing: str, things: str | None = None) -> str:
    """A number with its noun: "1 image", "2 images", "2 classes" (give the plural where it is not +s)."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"
