"""Write docs/cost.md's tables between their marks: python benchmarks/cost_table.py

Operations per image and step, by recipe, size and resolution; then what clusters make of them.
"""

from collections.abc import Callable
from pathlib import Path

from selfalign import ResolvedConfig, recipe, resolve
from selfalign.benchmark.cluster import Cluster, Sharding, cluster_cost
from selfalign.benchmark.cost import Cost, Rates, step_cost

PAGE = Path(__file__).parents[1] / "docs" / "cost.md"
RECIPES = ("sit", "sra", "self-flow", "sra-dts-as")
SIZES = ("S/2", "B/2", "L/2", "XL/2", "2B/2", "5B/2", "10B/2")
TOKENS = {256: 32, 1024: 64, 4096: 128, 16384: 256}
"""Tokens, and the side of the latents that has so many at patch size 2."""
RATES = Rates(matmuls=400e12, attention=300e12, elementwise=2e12, memory=2e12)
"""Assumed of a device, under bf16."""


def config_of(name: str, size: str, side: int, checkpointing: bool = False) -> ResolvedConfig:
    """A recipe at a size."""
    settings = {"model.size": size, "model.gradient_checkpointing": checkpointing}
    return resolve(recipe(name, settings), 4, (side, side), 1000)


def operations_row(size: str, tokens: int) -> str:
    """Operations of every recipe, and the shares of teacher, head and separation."""
    side = TOKENS[tokens]
    costs = {name: step_cost(config_of(name, size, side), 1) for name in RECIPES}
    flops = {name: cost.flops for name, cost in costs.items()}
    teacher = costs["sra"].teacher_forward
    head = flops["sra"] - flops["sit"] - teacher
    saved = 1 - flops["sra-dts-as"] / flops["self-flow"]
    cells = " | ".join(f"{value / 1e9:,.0f}" for value in flops.values())
    return (
        f"| {size} | {8 * side}² | {tokens:,} | {cells} | {teacher / flops['sra']:.1%} | "
        f"{head / flops['sra']:.1%} | {saved:.1%} |"
    )


def operations() -> str:
    """The table of operations."""
    names = " | ".join(f"`{name}`" for name in RECIPES)
    head = f"| size | image | tokens | {names} | teacher | head | separation saves |"
    rows = [operations_row(size, tokens) for size in SIZES for tokens in TOKENS]
    return "\n".join([head, "| --- | --- | --- |" + " --- |" * (len(RECIPES) + 3), *rows])


def cluster_row(size: str, tokens: int, devices: int, nodes: int, per_device: int) -> str:
    """Memory and time of every sharding."""
    config = config_of("sra-dts-as", size, TOKENS[tokens], checkpointing=True)
    cost: Cost = step_cost(config, per_device)
    kinds: tuple[Sharding, ...] = ("none", "gradients", "full")
    cells = []
    for sharding in kinds:
        cluster = Cluster(devices, nodes, sharding, weight_bytes=2)
        found = cluster_cost(cost, RATES, cluster, config.depth)
        memory = found.state_bytes + cost.activation_bytes / 2
        cells.append(
            f"{memory / 2**30:,.0f} | {1e3 * found.seconds:,.0f} ({1e3 * found.exposed_seconds:,.0f})"
        )
    return (
        f"| {size} | {tokens:,} | {devices} in {nodes} | {devices * per_device:,} | "
        + " | ".join(cells)
        + " |"
    )


def clusters() -> str:
    """The table of clusters."""
    cases = [
        *(("XL/2", 256, 8, 1, 32), ("XL/2", 256, 64, 8, 4), ("XL/2", 4096, 64, 8, 4)),
        *(("2B/2", 1024, 64, 8, 8), ("5B/2", 1024, 64, 8, 8), ("5B/2", 4096, 64, 8, 4)),
        *(("10B/2", 1024, 64, 8, 8), ("10B/2", 4096, 64, 8, 4), ("10B/2", 16384, 64, 8, 1)),
        ("10B/2", 1024, 512, 64, 1),
    ]
    lines = [
        "| size | tokens | devices in nodes | batch | none: GiB | ms (exposed) | gradients: GiB | "
        "ms (exposed) | full: GiB | ms (exposed) |",
        "| --- |" + " --- |" * 9,
    ]
    return "\n".join(lines + [cluster_row(*case) for case in cases])


TABLES: dict[str, Callable[[], str]] = {"operations": operations, "clusters": clusters}


def between_marks(page: str, name: str) -> tuple[str, str, str]:
    """What stands before a table of the page, the table, and what stands after it."""
    begin, end = f"<!-- {name} -->\n\n", f"\n\n<!-- end of {name} -->"
    before, _, rest = page.partition(begin)
    table, _, after = rest.partition(end)
    return before + begin, table, end + after


if __name__ == "__main__":
    text = PAGE.read_text()
    for name, make in TABLES.items():
        before, _, after = between_marks(text, name)
        text = before + make() + after
    PAGE.write_text(text)
