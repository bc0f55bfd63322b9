"""What is fetched from the Hugging Face hub: its cache first, and its network asked once."""

import contextlib
import logging
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_SECONDS = 10
"""How long the hub may take to answer at all."""


def from_hub(fetch: Callable[[bool], T]) -> T:
    """What is in the hub's cache, or is downloaded if the hub can be reached.

    huggingface_hub itself asks six times for every file of a hub that is out of reach, half a minute each.

    Args:
        fetch: gets it by a function of the hub; its argument is that function's `local_files_only`.

    Raises:
        Exception: what `fetch` raises, or the network.
    """
    _be_quiet()
    with contextlib.suppress(Exception):  # it is not here, or not all of it
        return fetch(True)
    _ask()
    return fetch(False)


def use_cache_if_out_of_reach(*readers: Any) -> None:
    """Switch the network off where the hub is out of reach, for functions that cannot be told to.

    Args:
        readers: modules besides huggingface_hub's that have the switch, HF_HUB_OFFLINE.
    """
    from huggingface_hub import constants

    _be_quiet()
    try:
        _ask()
    except Exception:  # noqa: BLE001 - networks fail in many ways
        for module in (constants, *readers):
            module.HF_HUB_OFFLINE = True


def _ask() -> None:
    """Raises what the network raises where the hub is out of reach."""
    from huggingface_hub import constants, get_session

    if not constants.HF_HUB_OFFLINE:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)


def _be_quiet() -> None:
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    hub_logging.set_verbosity(logging.CRITICAL)  # it would print every attempt
