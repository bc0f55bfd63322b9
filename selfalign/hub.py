"""What is fetched from the Hugging Face hub: its cache first, and its network asked once."""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from selfalign.errors import UserError

T = TypeVar("T")
PREFIX = "hub:"
ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
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


def fetch_weights(name: str) -> Path:
    """The local copy of `hub:OWNER/NAME[:FILE]`; a name without that prefix is a path already.

    Raises:
        UserError: there is no such repository or file, or it has to be
            said which.
    """
    if not name.startswith(PREFIX):
        return Path(name)
    repository, _, file = name.removeprefix(PREFIX).partition(":")
    if repository.count("/") != 1:
        raise UserError(f"{name!r}: allowed is {PREFIX}OWNER/NAME, or {PREFIX}OWNER/NAME:FILE")
    import huggingface_hub

    try:
        if not file:
            _ask()
            files = [f for f in huggingface_hub.list_repo_files(repository) if f.endswith(ENDINGS)]
            if len(files) != 1:
                raise UserError(
                    f"{name} holds {', '.join(sorted(files)) or 'no weights'}: say which, as in "
                    f"{PREFIX}{repository}:FILE"
                )
            (file,) = files
        return Path(
            from_hub(
                lambda local: huggingface_hub.hf_hub_download(
                    repository, file, local_files_only=local
                )
            )
        )
    except UserError:
        raise
    except Exception as error:  # the network, the hub, and what people may not see
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{name} cannot be fetched: {reason or type(error).__name__}") from error


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
