"""Token mixers by name: what `--token-mix` chooses.

>>> mixer = token_mixer("both", over=MixupCutMix(), rho=0.004, kappa=3)      # doctest: +SKIP
"""

from __future__ import annotations

import difflib
from typing import Any

from foveal.mix.alignmix import AlignMix
from foveal.mix.manifold import ManifoldMixup
from foveal.mix.mixer import Mixer
from foveal.mix.none import NoMix
from foveal.mix.token_mixer import TokenMixer
from foveal.mix.tokenmixup import TokenMixup

TOKEN_MIXERS: dict[str, tuple[type[TokenMixer[Any]], dict[str, Any]]] = {  # name -> class, what the name settles
    "horizontal": (TokenMixup, {"horizontal": 2, "vertical": None}),
    "vertical": (TokenMixup, {"horizontal": None, "vertical": 2}),
    "both": (TokenMixup, {"horizontal": 2, "vertical": 3}),
    "manifold": (ManifoldMixup, {}),
    "alignmix": (AlignMix, {}),
}


def token_mixer(name: str, over: Mixer[Any] | None = None, **settings: Any) -> TokenMixer[Any]:
    """The token mixer of this name on top of a mixer of images (None: of none).

    settings: fields of its class, such as horizontal=3 for another block. Raises ValueError for a name that is not
    known, TypeError for a setting that its class does not have.
    """
    if name not in TOKEN_MIXERS:
        near = difflib.get_close_matches(name, TOKEN_MIXERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"token mixer {name!r} is not known; {hint}use one of {', '.join(TOKEN_MIXERS)}")
    kind, settled = TOKEN_MIXERS[name]
    return kind(over=NoMix() if over is None else over, **{**settled, **settings})
