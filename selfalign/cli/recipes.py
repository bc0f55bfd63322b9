"""`selfalign recipes`."""

from collections.abc import Sequence

from rich.table import Column, Table

from selfalign.cli.console import console
from selfalign.errors import UserError
from selfalign.recipes import COSTS, RECIPES


def recipes_command(arguments: Sequence[str]) -> int:
    """`selfalign recipes`."""
    if arguments and arguments[0] not in ("-h", "--help"):
        raise UserError(f"selfalign recipes takes no arguments, got {arguments[0]!r}")
    table = _table("what sets it apart", "settings that differ from sit")
    for name, entry in RECIPES.items():
        settings = ", ".join(f"{key} {value}" for key, value in entry.settings.items())
        table.add_row(name, entry.summary, settings or "–")
    console.print(table)
    facts = _table("needs", "cost", "its paper reports", "recorded case")
    for name, entry in RECIPES.items():
        cost = f"{COSTS[name]:.3f}"
        facts.add_row(name, entry.needs, cost, entry.reported or "–", entry.proof or "–")
    console.print(facts)
    console.print(
        "cost: operations of a step relative to those of sit (SiT-XL/2, 256 tokens, features stored); a "
        "recorded case is a file of tests/golden that the objective reproduces"
    )
    console.print(
        "train one: selfalign train RECIPE --out DIR; settings: selfalign train RECIPE --help"
    )
    return 0


def _table(*headers: str) -> Table:
    """Where nothing is cut off: of a name that is, nobody can make use."""
    columns = (Column(header, overflow="fold") for header in headers)
    return Table(Column("recipe", no_wrap=True), *columns, box=None)
