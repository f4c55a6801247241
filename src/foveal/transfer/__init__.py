"""Fine-tune on few images without losing where the pre-trained model looks."""

from foveal.transfer.attention_transfer import AttentionCopy, AttentionTransfer, attention_transfer_loss
from foveal.transfer.attn_distill import AttnDistill, attn_distill_loss
from foveal.transfer.bss import BSS
from foveal.transfer.channels import channel_attention
from foveal.transfer.co_tuning import CoTuning, co_tuning_loss, co_tuning_of
from foveal.transfer.delta import DELTA, delta_loss
from foveal.transfer.gta import GTA, converted, gta_loss, output_loss
from foveal.transfer.guide import Guide, Guided
from foveal.transfer.l2_sp import L2SP
from foveal.transfer.lora import inject, is_adapted, merged_state, without_adapters
from foveal.transfer.source import Source
from foveal.transfer.tuned import Chosen, choose, freeze

GUIDES = {
    "none": None,
    "gta": GTA,
    "attention_transfer": AttentionTransfer,
    "attn_distill": AttnDistill,
    "l2_sp": L2SP,
    "delta": DELTA,
    "bss": BSS,
    "co_tuning": CoTuning,
}
"""Guidance by name; None guides nothing."""

__all__ = [
    "BSS",
    "DELTA",
    "GTA",
    "GUIDES",
    "L2SP",
    "AttentionCopy",
    "AttentionTransfer",
    "AttnDistill",
    "Chosen",
    "CoTuning",
    "Guide",
    "Guided",
    "Source",
    "attention_transfer_loss",
    "attn_distill_loss",
    "channel_attention",
    "choose",
    "co_tuning_loss",
    "co_tuning_of",
    "converted",
    "delta_loss",
    "freeze",
    "gta_loss",
    "inject",
    "is_adapted",
    "merged_state",
    "output_loss",
    "without_adapters",
]
