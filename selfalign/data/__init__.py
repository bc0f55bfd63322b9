"""Data sets, and the stream that makes each step's batch a function of the step."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfalign.data.datasets import open_data

__all__ = ["open_data"]


def __getattr__(name: str) -> Any:
    # When it is asked for: settings are read from this package without importing torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from selfalign.data import datasets

    return getattr(datasets, name)
