"""Freezing whole parts of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

Parts = TypeVar("Parts", bound="FreezableParts")


class FreezableParts(nn.Module, ABC):
    """A model whose parts can be frozen by name; frozen modules stay in eval mode."""

    config: Any
    _frozen: set[str]

    @abstractmethod
    def parts(self) -> dict[str, list[nn.Module | nn.Parameter]]:
        """Modules and parameters by the name of their part."""

    def freeze(self, names: Iterable[str]) -> None:
        """Stop training whole parts (`vision`, `text`, `dual_head`, `fusion`); their modules stay in eval mode.

        Raises:
            ValueError: there is no such part, or it has LoRA adapters.
        """
        parts = self.parts()
        for name in names:
            if name not in parts:
                raise ValueError(f"cannot freeze {name!r}; parts: {', '.join(parts)}")
            if name in (self.config.lora or ()):
                raise ValueError(f"cannot freeze {name!r}: its LoRA adapters train, and its own weights stay anyway")
            self._frozen.add(name)
            for item in parts[name]:
                item.requires_grad_(False)
        self.train(self.training)

    @property
    def frozen(self) -> frozenset[str]:
        """The names of the frozen parts."""
        return frozenset(self._frozen)

    def train(self: Parts, mode: bool = True) -> Parts:
        super().train(mode)
        for name in getattr(self, "_frozen", ()):
            for item in self.parts()[name]:
                if isinstance(item, nn.Module):
                    item.eval()  # This turns dropout off and keeps batch statistics.
        return self
