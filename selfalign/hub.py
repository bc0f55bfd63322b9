"""What is fetched from the Hugging Face hub: its cache first, and its network asked once."""

import contextlib
import logging
from collections.abc import Callable
from typing import TypeVar

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
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    hub_logging.set_verbosity(logging.CRITICAL)  # it would print every attempt
    with contextlib.suppress(Exception):  # it is not here, or not all of it
        return fetch(True)
    if not constants.HF_HUB_OFFLINE:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    return fetch(False)
