"""A source of maps that gives what it was told to."""

from foveal.maps import found


class Fixed:
    """Always the same maps (B, h, w), and logits if there are any. `asked`: what it was called with."""

    def __init__(self, map, logits=None, model=None):
        self.map, self.logits, self.model, self.asked = map, logits, model, []

    def __call__(self, images, labels=None, given=None):
        self.asked.append((images, labels, given))
        return found(self.map, self.logits)
