"""The options of every architecture as a Markdown table, apart by whether weights show them."""

from kdpipe.pipeline.models.options import UNTRACED, options_of


def section(_given: str = "") -> str:
    """A row for each architecture: the options that its weights do not show, and all others."""
    rows = []
    for architecture, untraced in UNTRACED.items():
        others = [name for name in options_of(architecture) if name not in untraced]
        rows.append(f"| `{architecture}` | {_names(untraced)} | {_names(others)} |")
    return "\n".join(["| architecture | leave no trace in the weights | other options |", "| --- | --- | --- |", *rows])


def _names(options: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"`{name}`" for name in options) or "none"
