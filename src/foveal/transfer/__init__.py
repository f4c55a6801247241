"""Fine-tune on few images without losing where the pre-trained model looks."""

from foveal.transfer.attention_transfer import AttentionCopy, AttentionTransfer, attention_transfer_loss
from foveal.transfer.attn_distill import AttnDistill, attn_distill_loss
from foveal.transfer.gta import GTA, converted, gta_loss, output_loss
from foveal.transfer.guide import Guide, Guided
from foveal.transfer.lora import inject, is_adapted, merged_state, without_adapters
from foveal.transfer.source import Source
from foveal.transfer.tuned import Chosen, choose, freeze

GUIDES = {"none": None, "gta": GTA, "attention_transfer": AttentionTransfer, "attn_distill": AttnDistill}
"""Guidance by name; None guides nothing."""

__all__ = [
    "GTA",
    "GUIDES",
    "AttentionCopy",
    "AttentionTransfer",
    "AttnDistill",
    "Chosen",
    "Guide",
    "Guided",
    "Source",
    "attention_transfer_loss",
    "attn_distill_loss",
    "choose",
    "converted",
    "freeze",
    "gta_loss",
    "inject",
    "is_adapted",
    "merged_state",
    "output_loss",
    "without_adapters",
]
