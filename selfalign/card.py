"""Model cards: what weights are, what they were trained on, how well they do, and how to load them."""

import json
import re
from collections.abc import Mapping
from typing import Any

import selfalign

SITE = "https://arxiv.org/abs/2607.02508"
NOT_STATED = "not stated"
LOADING = {
    "hub": """```python
from selfalign import SiT

model = SiT.from_pretrained("{where}")  # t = 1 is noise; velocity(x, timesteps, labels) is dx/dt
```""",
    "diffusers": """```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{where}", trust_remote_code=True)
images = pipeline({example}num_inference_steps=50).images
```

It needs torch and diffusers alone. `trust_remote_code` runs the two Python files
of this folder: read them first.""",
    "sit": """```python
from models import SiT_models  # SiT's own code; its time runs the other way, as in these weights
from safetensors.torch import load_file

model = SiT_models["SiT-…"](input_size={side}, num_classes={classes})  # {size}
model.load_state_dict(load_file("{where}/model.safetensors"))
```

The rows of the learned sigma, which SiT never uses, are zero.""",
}


def model_card(
    loading: str = "hub",
    where: str = ".",
    *,
    recipe: str = NOT_STATED,
    data: str = NOT_STATED,
    steps: str = NOT_STATED,
    metrics: Mapping[str, str] | None = None,
    start: str = "",
    origin: Mapping[str, Any] | None = None,
    licence: str = "",
    config: Mapping[str, Any] | None = None,
    **words: Any,
) -> str:
    """The text of README.md.

    Args:
        loading: a key of `LOADING`.
        where: what the example loads from.
        recipe, data, steps, metrics, start, origin, licence, config: from `card_facts`.
        words: further ones of the example.
    """
    library = "diffusers" if loading == "diffusers" else "selfalign"
    head = ["---", f"library_name: {library}", "tags:", "- diffusion", "- flow-matching", "- sit"]
    if licence:
        plain = re.fullmatch(r"[\w.-]+", licence)
        head.insert(1, f"license: {licence.lower() if plain else json.dumps(licence)}")
    rows = [("recipe", recipe), ("data", data), ("steps", steps), *(metrics or {}).items()]
    if start:
        rows.append(("started from", start))
    if origin:
        came = f"{origin['file']} (from {origin['from']}, SHA-256 {origin['sha256'][:16]}…)"
        rows.append(("weights it came from", came))
        rows.append(("their licence", origin["licence"] or NOT_STATED))
    rows.append(("licence", licence or NOT_STATED))
    table = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows)
    parts = [
        "\n".join([*head, "---"]),
        "# A diffusion transformer",
        f"A SiT (arXiv:2401.08740), written by selfalign {selfalign.__version__} ([method]({SITE})), with "
        "the weights of an exponential moving average unless its maker says otherwise.",
        f"| what | |\n| --- | --- |\n{table}",
        "## Load",
        LOADING[loading].format(where=where, **words),
    ]
    if config:
        settings = json.dumps(config, indent=2)
        parts += ["## Settings", f"```json\n{settings}\n```"]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """Text as a cell of Markdown's tables: one line, whose bars and tags are no markup."""
    line = " ".join(text.split())
    return line.replace("|", "\\|").replace("<", "&lt;")
