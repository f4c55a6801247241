"""What goes wrong when a model is read, in words that name the cause and the way out."""


class UnsupportedModelError(ValueError):
    """The model cannot be read exactly; the message says why and what can be."""


class ReadError(RuntimeError):
    """A read saw no forward, several, or not what was asked of it."""
