"""What several processes do together: fail, and leave."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from selfalign.errors import AgreedError, UserError

T = TypeVar("T")


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """A block that all processes enter, and that none leaves well if it failed in any.

    Without it, those without an error would wait for the others at the next point where they meet. The
    processes meet at the end of the block; within it they may meet only in further blocks of this kind,
    or where all get to or none.

    Raises:
        AgreedError: some process raised a UserError, perhaps this one; the first one's message.
    """
    error = None
    try:
        yield
    except AgreedError:
        raise  # all processes left the block with it
    except UserError as raised:
        error = raised
    if accelerator.num_processes == 1:
        if error is not None:
            raise error
        return
    for message in gather_object([str(error) if error else None]):
        if message is not None:
            raise AgreedError(message) from error


def main_process_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do the same in every process, but first in the main one, which downloads or makes what is missing.

    Raises:
        AgreedError: as `together` does.
    """
    results = []
    for turn in (True, False):
        with together(accelerator):
            if accelerator.is_main_process == turn:
                results.append(work())
    return results[0]


def leave() -> None:
    """End the process group, if there is one; for the end of work that all processes reach.

    Its threads drop Python objects now and then, and abort a process whose interpreter has ended by then
    (pytorch/pytorch#179291). A process that fails alone must not wait for the others here.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
