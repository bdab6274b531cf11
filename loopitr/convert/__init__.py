"""Converts public checkpoints of ALBEF and BLIP to LoopITR models with the same outputs, and back to BLIP.

The command is `loopitr convert albef|blip SRC OUT`, or `python -m loopitr.convert`.
"""

from typing import TYPE_CHECKING

from loopitr.lazy import lazy_names

if TYPE_CHECKING:
    from loopitr.convert.albef import convert_albef
    from loopitr.convert.blip import convert_blip
    from loopitr.convert.to_blip import to_blip

__all__ = ["convert_albef", "convert_blip", "to_blip"]
__getattr__, __dir__ = lazy_names(__name__, {"convert_albef": ".albef", "convert_blip": ".blip", "to_blip": ".to_blip"})
