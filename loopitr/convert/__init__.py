"""Converts public checkpoints of ALBEF and BLIP to LoopITR models with the same outputs, and back to BLIP.

The command is `loopitr convert albef|blip SRC OUT`, or `python -m loopitr.convert`.
"""

from loopitr.convert.albef import convert_albef
from loopitr.convert.blip import convert_blip
from loopitr.convert.to_blip import to_blip

__all__ = ["convert_albef", "convert_blip", "to_blip"]
