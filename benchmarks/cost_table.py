"""Write docs/cost.md's table: operations per image and step, by recipe, size and resolution."""

from selfalign import recipe, resolve
from selfalign.benchmark.cost import step_cost

RECIPES = ("sit", "sra", "self-flow", "sra-dts-as")


def table() -> str:
    """The table as Markdown."""
    lines = [
        "| size | image | tokens | "
        + " | ".join(f"`{name}`" for name in RECIPES)
        + " | separation saves |",
        "| --- | --- | --- | " + "--- | " * len(RECIPES) + "--- |",
    ]
    for size in ("S/2", "B/2", "L/2", "XL/2"):
        for pixels in (256, 512, 1024):
            side = pixels // 8
            flops = {}
            for name in RECIPES:
                config = resolve(recipe(name, {"model.size": size}), 4, (side, side), 1000)
                flops[name] = step_cost(config, 1).flops
            saved = 1 - flops["sra-dts-as"] / flops["self-flow"]
            cells = " | ".join(f"{value / 1e9:,.0f}" for value in flops.values())
            lines.append(f"| {size} | {pixels}² | {side**2 // 4} | {cells} | {saved:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
