"""What can go wrong in training, as errors that say what to do."""


class SettingsError(ValueError):
    """A setting is unknown, of the wrong type, or does not go with another one."""


class RunError(RuntimeError):
    """A run cannot be started, continued, written or read."""


class DivergedError(RunError):
    """The training loss is no longer a number."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after everything was put in order; the message says how to go on."""
