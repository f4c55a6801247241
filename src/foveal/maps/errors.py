"""What goes wrong when a model is asked where to look."""


class MapModelError(ValueError):
    """The model cannot make this map; the message says what was found, what fits and what to try."""
