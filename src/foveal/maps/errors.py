"""What goes wrong when a model is asked where to look."""


class MapModelError(ValueError):
    """The model cannot make this map; the message says what was found, what fits and what to try."""


class MapWarning(UserWarning):
    """Maps that prefer no place: their images are treated as if every place counted alike."""


class MapStoreError(ValueError):
    """A store of maps cannot be made, filled or used; the message says what differs, is missing or is full."""
