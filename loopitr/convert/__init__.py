"""Public checkpoints of other projects -> LoopITR models that give the same numbers, and back.

As a command: `python -m loopitr.convert albef|blip SRC OUT`.
"""

from loopitr.convert.albef import convert_albef
from loopitr.convert.blip import convert_blip
from loopitr.convert.to_blip import to_blip

__all__ = ["convert_albef", "convert_blip", "to_blip"]
