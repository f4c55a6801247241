"""How much a model leans on the background: the BG-Gap of the Backgrounds Challenge.

    BG-Gap = accuracy(mixed_same) - accuracy(mixed_rand), in points        Xiao et al., 2020

mixed_same: foregrounds on backgrounds of their own class; mixed_rand: on backgrounds of a random class. A model
that looks at the foreground only has a gap of 0.
"""


def bg_gap(same: float, rand: float) -> float:
    """same, rand: accuracies in [0, 1].  Returns points, in [-100, 100]. Raises ValueError for percentages."""
    for name, value in (("same", same), ("rand", rand)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} is not an accuracy in [0, 1]; divide percentages by 100")
    return 100 * (same - rand)
