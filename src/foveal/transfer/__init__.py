"""Fine-tune on few images without losing where the pre-trained model looks."""

from foveal.transfer.gta import GTA, converted, gta_loss, output_loss
from foveal.transfer.guide import Guide, Guided
from foveal.transfer.source import Source

GUIDES = {"none": None, "gta": GTA}
"""Guidance by name; None guides nothing."""

__all__ = ["GTA", "GUIDES", "Guide", "Guided", "Source", "converted", "gta_loss", "output_loss"]
