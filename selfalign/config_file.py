"""Config trees in files: what `train --config` reads and `--write-config` writes. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfalign.config import RunConfig, config_from_dict, config_to_dict, override
from selfalign.disk import write_whole
from selfalign.errors import UserError
from selfalign.pages.settings import flatten
from selfalign.parts import require_named_plugins
from selfalign.recipes import nearest_recipe, recipe
from selfalign.records import read_plain, write_json

RECIPE = "recipe"
"""The key that names the recipe to which the others are differences."""
ENDINGS = (".yaml", ".yml", ".json")


def read_values(path: Path) -> dict[str, Any]:
    """The dictionary in a YAML or JSON file; of a run's config.json all of it.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    if path.suffix not in ENDINGS:
        raise UserError(f"{path}: allowed are files that end in {', '.join(ENDINGS)}")
    if not path.is_file():
        raise UserError(f"{path} does not exist, or is no file")
    if path.suffix == ".json":
        values = read_plain(path)
    else:
        from selfalign.yaml_values import read_yaml

        values = read_yaml(path, "a config")
    if not isinstance(values, dict):
        raise UserError(
            f"{path} is not a config: needed are keys and values, as training: steps: 100"
        )
    return values


def tree_of(values: Mapping[str, Any]) -> RunConfig:
    """The tree that a file describes.

    Args:
        values: a tree of sections, perhaps with dotted names and the key `recipe`; or a run's config.json.

    Raises:
        UserError: a field is unknown, or a value is not allowed.
    """
    if "selfalign_version" in values and isinstance(values.get("config"), Mapping):
        return config_from_dict(values["config"])
    if RECIPE not in values:
        return config_from_dict(values)
    flat = flatten({name: value for name, value in values.items() if name != RECIPE})
    require_named_plugins(flat.get("plugins", ()))
    return override(recipe(str(values[RECIPE])), flat)


def read_config(path: Path) -> RunConfig:
    """The tree in a file. Raises what `read_values` and `tree_of` raise, naming the file."""
    values = read_values(path)
    try:
        return tree_of(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def write_config_file(path: Path, config: RunConfig) -> None:
    """Write what sets a tree apart from the nearest recipe, so that `read_config` reads the same tree.

    Raises:
        UserError: the name ends in something else than `ENDINGS`, or the disk does not take it.
    """
    if path.suffix not in ENDINGS:
        raise UserError(
            f"--write-config is {str(path)!r}: allowed are names that end in {', '.join(ENDINGS)}"
        )
    name = nearest_recipe(config)
    base = flatten(config_to_dict(recipe(name)))
    own = flatten(config_to_dict(config))
    record: dict[str, Any] = {RECIPE: name}
    for dotted, value in own.items():
        if dotted not in base or value != base[dotted]:
            *sections, field = dotted.split(".")
            place = record
            for section in sections:
                place = place.setdefault(section, {})
            place[field] = value
    if path.suffix == ".json":
        write_json(path, record)
    else:
        import yaml

        text = yaml.safe_dump(record, sort_keys=False)
        write_whole(path, lambda partial: partial.write_text(text))
