"""SMMix: cut what the partner's patches look at, paste where the image's do not, label by area.

    A_n = mean over heads and query patches of the last block's attention to patch n        lam = 1 - k_h k_w / (h w)

Chen et al., ICCV 2023. The model being trained looks at the clean images itself, in the same forward that gives the
logits for the consistency loss. The paper also has the region loss (`region=1`); it is off here, as in TdAttenMix.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveal.maps import Source
from foveal.mix.window_mixer import Places, WindowMixer


@dataclass(kw_only=True)
class SMMix(WindowMixer):
    """SMMix; settings as WindowMixer. Fits models with attention; other maps fit others."""

    map: str | Source = "received_attention"

    def own_share(self, places: Places, area: Tensor) -> Tensor:
        """The area."""
        return area
