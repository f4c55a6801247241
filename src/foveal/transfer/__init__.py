"""Fine-tune on few images without losing where the pre-trained model looks."""

from foveal.transfer.gta import GTA, Guided, gta_loss

GUIDES = {"none": None, "gta": GTA}
"""Guidance by name; None guides nothing."""

__all__ = ["GTA", "GUIDES", "Guided", "gta_loss"]
