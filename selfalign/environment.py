"""Variables that launchers and profiles set, looked at before torch and accelerate read them.

What those would fail at in the middle, or take half of, is refused by name. Nothing here imports torch:
some of the variables make its import fail.
"""

import os
import warnings

from selfalign.errors import UserError

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher of several processes sets, all of it."""
_COUNTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""How many processes MPI has started, by its kinds."""
_FLAGS = (
    *("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "FORK_LAUNCHED"),
    "USE_TORCH_XLA",
)
_TRUE, _FALSE = ("1", "true", "yes", "y", "t", "on"), ("0", "false", "no", "n", "f", "off")
_LEVELS = ("debug", "info", "warn", "warning", "error", "fatal", "critical", "notset")
_OTHER_WAYS = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")


def check_environment() -> None:
    """Refuse what torch and accelerate would fail at, or share the work by in another way.

    Raises:
        UserError: a variable of theirs is set to what it cannot be, or a part of what a launcher sets.
    """
    for name in _FLAGS:
        value = os.environ.get(name, "0")
        if value.lower() not in (*_TRUE, *_FALSE):
            raise UserError(f"{name} is {value!r}: allowed are true and false, or unset it")
    level = os.environ.get("ACCELERATE_LOG_LEVEL")
    if level is not None and level.lower() not in _LEVELS:
        raise UserError(
            f"ACCELERATE_LOG_LEVEL is {level!r}: allowed are {', '.join(_LEVELS)}, or unset it"
        )
    for way in _OTHER_WAYS:
        if os.environ.get(f"ACCELERATE_USE_{way}", "").lower() in _TRUE:
            raise UserError(
                f"ACCELERATE_USE_{way} is set: processes share a batch, and a model by --training.sharding; "
                "launch with --multi_gpu, or with torchrun"
            )
    if override := os.environ.get("NVIDIA_TF32_OVERRIDE"):
        warnings.warn(
            f"NVIDIA_TF32_OVERRIDE is {override!r}: on NVIDIA's GPUs it decides over training.tf32",
            stacklevel=2,
        )
    if is_launched():
        _check_launcher()
    elif others := [name for name in _MPI if os.environ.get(name, "1") != "1"]:
        raise UserError(
            f"{others[0]} is {os.environ[others[0]]!r}: processes that MPI starts do not know of each other "
            "here; launch with torchrun, or unset it for one process"
        )


def is_launched() -> bool:
    """Whether variables say that this is one of several processes, or that a launcher has started it."""
    return (
        "LOCAL_RANK" in os.environ
        or os.environ.get("WORLD_SIZE", "1") != "1"
        or os.environ.get("RANK", "0") != "0"
    )


def is_first_process() -> bool:
    """Whether this process speaks for all: the only one, or the first that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def forget_others() -> None:
    """Make this the only process, for work that is not shared."""
    for name in (*_LAUNCHER, "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


def _check_launcher() -> None:
    if missing := [name for name in _LAUNCHER if name not in os.environ]:
        found = [name for name in _LAUNCHER if name in os.environ]
        raise UserError(
            f"{', '.join(found)} set without {', '.join(missing)}: launchers of several processes set all of "
            "them (torchrun, accelerate launch); unset them for one process"
        )
    for name in _COUNTS:
        if not os.environ.get(name, "0").isdecimal():
            raise UserError(f"{name} is {os.environ[name]!r}: allowed is a whole number from 0")
    for number, count in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if count in os.environ and int(os.environ[number]) >= int(os.environ[count]):
            raise UserError(
                f"{number} is {os.environ[number]}: allowed is less than {count}, {os.environ[count]}"
            )
