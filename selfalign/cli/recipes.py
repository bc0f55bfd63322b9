"""`selfalign recipes`."""

from collections.abc import Sequence

from rich.table import Table

from selfalign.cli.console import console
from selfalign.errors import UserError
from selfalign.recipes import RECIPES


def recipes_command(arguments: Sequence[str]) -> int:
    """`selfalign recipes`."""
    if arguments and arguments[0] not in ("-h", "--help"):
        raise UserError(f"selfalign recipes takes no arguments, got {arguments[0]!r}")
    table = Table("recipe", "what sets it apart", "settings that differ from sit", box=None)
    for name, entry in RECIPES.items():
        settings = ", ".join(f"{key} {value}" for key, value in entry.settings.items())
        table.add_row(name, entry.summary, settings or "–")
    console.print(table)
    console.print(
        "train one: selfalign train RECIPE --out DIR; settings: selfalign train RECIPE --help"
    )
    return 0
