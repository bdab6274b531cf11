"""What `recipes/export_dual.py` does: write the dual encoder of a trained model as a folder of its own."""

from dataclasses import dataclass


@dataclass
class ExportOptions:
    """What goes where."""

    model: str
    """Run folder or hub id."""
    output: str
    """Folder to write."""


def export(options: ExportOptions) -> None:
    """Write the dual encoder and say how large it is.

    Raises:
        ValueError, OSError: no such model, a dual encoder already, or a folder that cannot be written.
    """
    from loopitr.export.dual import export_dual  # It is imported here, since --help does without torch.

    dual = export_dual(options.model, options.output)
    parameters = sum(parameter.numel() for parameter in dual.parameters())
    print(f"dual encoder with {parameters / 1e6:.1f}M parameters in {options.output}")
