"""Devices and processes: what a launcher gives, and what several processes do together: fail, and end."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
    gather_object,
    parse_flag_from_env,
)

from selfalign.environment import check_environment, is_launched
from selfalign.errors import AgreedError, UserError
from selfalign.signals import stop_signals

T = TypeVar("T")
LONGEST_WAIT = timedelta(hours=2)
"""How long a process waits for another one: for what the main one does alone (downloads, samples), which may
take longer than torch's 10 minutes. One that died is noticed by the launcher, and by gloo, at once."""


def open_accelerator(
    mixed_precision: str = "no", tf32: bool = True, handlers: Sequence[Any] = (), **settings: Any
) -> Accelerator:
    """Device and processes, as a launcher gives them; the arithmetic is as it is said here.

    accelerate reads what is left unsaid from variables that `accelerate launch` and people's profiles
    set, and some change results: ACCELERATE_GRADIENT_ACCUMULATION_STEPS divides every gradient.

    Args:
        mixed_precision: "no", "bf16" or "fp16".
        tf32: multiply float32 matrices on NVIDIA GPUs in TF32, as the released code does.
        handlers: accelerate's settings of DDP, for one.
        settings: more arguments of Accelerator.

    Raises:
        UserError: `check_environment` raises it, or the device is not there.
        ValueError: the device lacks the precision, where that is not "no".
    """
    check_environment()
    _check_devices()
    if "WORLD_SIZE" in os.environ and not torch.accelerator.is_available():
        # Without this, accelerate takes each of torchrun's processes on CPUs for the only one.
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    if torch.cuda.is_available():  # the switch would change arithmetic elsewhere too
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    # accelerate keeps the precision of a process's first accelerator; every run has its own.
    AcceleratorState._reset_state()
    try:
        with _ended_by_signals():
            _meet_anew()
            accelerator = Accelerator(
                mixed_precision=mixed_precision,
                kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT), *handlers],
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                dynamo_plugin=TorchDynamoPlugin(
                    backend="no",
                    mode="default",
                    fullgraph=False,
                    dynamic=False,
                    use_regional_compilation=False,
                ),
                **settings,
            )
        torch.ones(1, device=accelerator.device).item()
    except (AssertionError, ImportError, RuntimeError, ValueError) as error:
        if isinstance(error, ValueError) and mixed_precision != "no":
            raise
        # Also of devices that hold no numbers (meta), and of a torch built without them.
        device = os.environ.get("ACCELERATE_TORCH_DEVICE", "")
        which = f"ACCELERATE_TORCH_DEVICE is {device!r}, and " if device else ""
        raise UserError(f"{which}the device cannot be used: {error}") from error
    return accelerator


def _check_devices() -> None:
    """Refuse more processes on this machine than it has GPUs: two that share one end in errors of NCCL."""
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if 0 < gpus < here and not _on_cpus():
        raise UserError(
            f"{here} processes were started on this machine, and it has {gpus} "
            f"GPU{'s' if gpus > 1 else ''}: start one for each, or let all use the CPU by "
            "ACCELERATE_USE_CPU=true"
        )


def _on_cpus() -> bool:
    """Whether accelerate was told to leave GPUs alone."""
    return parse_flag_from_env("ACCELERATE_USE_CPU")


def _meet_anew() -> None:
    """Open the group of processes that torchrun has started again, apart from the one before it.

    Its store outlives the processes, and holds the addresses of those that are gone: new ones that find them
    before they are replaced cannot connect.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or not dist.is_available() or dist.is_initialized():
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    on_gpus = torch.cuda.is_available() and not _on_cpus()
    store, rank, processes = next(rendezvous("env://", timeout=LONGEST_WAIT))
    dist.init_process_group(
        "nccl" if on_gpus else "gloo",
        store=PrefixStore(f"attempt_{attempt}", store),
        rank=rank,
        world_size=processes,
        timeout=LONGEST_WAIT,
    )


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within this block a stop signal ends one of several processes at once: there is nothing to tidy up.

    torch waits there for the others, which may never come, and Python would hear of a signal afterwards.
    """
    in_main = threading.current_thread() is threading.main_thread()
    watched = stop_signals() if is_launched() and in_main else ()
    previous = {number: signal.signal(number, signal.SIG_DFL) for number in watched}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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


def end_shared_process(code: int, agreed: bool) -> None:
    """End this process if it is one of a group, without ending its interpreter first.

    gloo's threads drop Python objects now and then, and abort a process whose interpreter is ending
    (pytorch/pytorch#179291), also after the group has been destroyed.

    Args:
        code: exit code of the process.
        agreed: whether all processes end here; one that fails alone must not wait for the others.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if agreed:
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
