"""Parts: the words of which a training step is a sentence, registered by kind and name.

A part is a frozen dataclass: its fields are its settings, its methods are what it does. It lives in one
file beside its kin, or in a user's file (`--plugins FILE.py`), and is chosen by name in the config tree.
Nothing but its own file lists it: this module finds the files.

Files of parts import torch within their methods, so that `selfalign --help` can list their settings
without it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from selfalign.errors import UserError
from selfalign.settings import Settings, require

HOMES: Mapping[str, str] = MappingProxyType(
    {
        "partition": "selfalign.partitions",
        "schedule": "selfalign.schedules",
        "curriculum": "selfalign.curriculums",
        "condition": "selfalign.conditions",
        "backbone": "selfalign.backbones",
        "target": "selfalign.targets",
        "projector": "selfalign.projectors",
        "encoder": "selfalign.encoders",
        "term": "selfalign.terms",
        "optimizer": "selfalign.training.optimizers",
        "source": "selfalign.data.sources",
        "solver": "selfalign.sampling.solvers",
    }
)
"""The kinds of parts, and the package whose modules hold those of this project."""
SECTIONS = {kind: f"{kind}s" for kind in HOMES} | {"source": "data.sources"}
"""Where the settings of a kind's parts are in the tree; `solvers` are in that of a sampling."""

_registered: dict[str, dict[str, type["Part"]]] = {kind: {} for kind in HOMES}
_aliases: dict[str, dict[str, str]] = {kind: {} for kind in HOMES}
_searched: set[str] = set()
_plugins: dict[Path, str] = {}
P = TypeVar("P", bound="Part")


@dataclass(frozen=True)
class Choosing(Settings):
    """Settings some of which are names of parts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for entry in dataclasses.fields(self):
            if "kind" not in entry.metadata:
                continue
            kind, none = entry.metadata["kind"], entry.metadata["none"]
            value, dotted = getattr(self, entry.name), self.dotted(entry.name)
            if value == none:
                continue
            several = isinstance(value, tuple)
            words = value if several else (value,)
            found = [get(kind, word, dotted, none).name for word in words]
            object.__setattr__(self, entry.name, tuple(found) if several else found[0])


@dataclass(frozen=True)
class Part(Choosing):
    """What all parts are: settings, of a kind, with a name."""

    kind: ClassVar[str]
    name: ClassVar[str] = ""

    def check_in(self, config: Any) -> None:
        """Refuse a config tree that this part, chosen in it, cannot be part of. Nothing by default.

        Args:
            config: the `RunConfig`, perhaps without the data's shapes.
        """

    def uses(self, config: Any) -> Iterable["Part"]:
        """Further parts that a term, target or curriculum chooses in a tree. None by default."""
        return ()


def register(name: str, *, aliases: tuple[str, ...] = ()) -> Callable[[type[P]], type[P]]:
    """Class decorator: make a part known by a name, and perhaps by older ones.

    Raises:
        UserError: another file has a part of that kind and name, or it is not a name for an option.
    """

    def decorate(part: type[P]) -> type[P]:
        if not part.__module__.startswith(f"{HOMES[part.kind]}."):
            _search(part.kind)  # or it could take the name of a part that nobody has asked for yet
        for word in (name, *aliases):
            allowed = "allowed are lower-case letters, digits and -"
            require(re.fullmatch("[a-z0-9-]+", word) is not None, part.kind, word, allowed)
            known = _registered[part.kind].get(_aliases[part.kind].get(word, word))
            if known is not None and known.__module__ != part.__module__:
                raise UserError(
                    f"{part.kind} {word!r} of {part.__module__}: {known.__module__} has one of that "
                    "name"
                )
        part.name = name
        part.section = f"{SECTIONS[part.kind]}.{name}"
        _registered[part.kind][name] = part
        _aliases[part.kind].update(dict.fromkeys(aliases, name))
        return part

    return decorate


def names(kind: str) -> tuple[str, ...]:
    """The parts of a kind, in alphabetical order."""
    _search(kind)
    return tuple(sorted(_registered[kind]))


def older_names(kind: str) -> tuple[str, ...]:
    """Names of earlier versions that are still understood."""
    _search(kind)
    return tuple(_aliases[kind])


def get(kind: str, name: str, setting: str | None = None, none: str | None = None) -> type[Any]:
    """A part's class, by its name or an older one.

    Raises:
        UserError: there is none of that name; `setting` is the option that chose it, and `none` a word
            that it takes besides.
    """
    _search(kind)
    name = _aliases[kind].get(name, name)
    if name not in _registered[kind]:
        known = ", ".join([*([none] if none else []), *names(kind)])
        require(False, setting or kind, name, f"allowed are {known}, and what --plugins adds")
    return _registered[kind][name]


def chosen(kind: str, default: Any, none: str | None = None) -> Any:
    """A dataclass field that holds the name of a part, or several names.

    Args:
        kind: of the part.
        default: the name, or a tuple of names.
        none: a word that stands for no part.
    """
    return field(default=default, metadata={"kind": kind, "none": none})


def _search(kind: str) -> None:
    """Import the files of a kind, each of which registers its parts."""
    if kind not in _searched:
        _searched.add(kind)
        package = importlib.import_module(HOMES[kind])
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{HOMES[kind]}.{module.name}")


def load_plugin(path: str) -> Path:
    """Run a user's file, which registers parts of its own, and return its whole path.

    A file that has run already is not run again.

    Raises:
        UserError: the file is missing or fails; the message says where.
    """
    file = _whole_path(path)
    if file in _plugins:
        return file
    # Named after the path, so that two files of the same name can stand side by side.
    name = f"selfalign_plugin_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    require(spec is not None and spec.loader is not None, "plugins", path, "must be a .py file")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (UserError, KeyboardInterrupt):
        del sys.modules[name]
        raise
    except BaseException as error:  # whatever a user's file raises, it is theirs to read
        del sys.modules[name]
        line = _line_within(file, error)
        raise UserError(f"plugins: {path}{line} fails: {type(error).__name__}: {error}") from error
    _plugins[file] = name
    _remember(file)
    return file


def loaded_plugins() -> tuple[Path, ...]:
    """The users' files that have run in this process."""
    return tuple(_plugins)


def require_named_plugins(files: object) -> None:
    """Refuse plugins that a file names (a run's config.json, a grid) and nobody here has named.

    They would be run, and whoever made the file may have made them too. A plugin that has been named once,
    on the command line or in Python, is known by its content from then on.

    Args:
        files: their names, as the file has them.

    Raises:
        UserError: these are no names, or one is of a plugin that is not known.
    """
    if not isinstance(files, list | tuple) or any(not isinstance(name, str) for name in files):
        raise UserError(f"plugins is {files!r}: allowed are names of files")
    for path in files:
        file = _whole_path(path)
        if file not in _plugins and not _mark(file).is_file():
            raise UserError(
                f"plugins is {path!r}, a file that would be run and that you have not named yourself: read "
                f"it, and if you trust it add --plugins {path}"
            )


def _whole_path(path: str) -> Path:
    try:
        file = Path(os.path.realpath(Path(path).expanduser()))
        there = file.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, nobody's home
        there = False
    require(there, "plugins", path, "there is no such file")
    return file


def _mark(file: Path) -> Path:
    """What stands for a plugin's content in the cache."""
    from selfalign.disk import cache_folder

    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"plugins: {file} cannot be read: {error.strerror}") from error
    return cache_folder("plugins") / hashlib.sha256(content).hexdigest()


def _remember(file: Path) -> None:
    with contextlib.suppress(OSError):  # it is asked for again where nothing can be kept
        mark = _mark(file)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _line_within(file: Path, error: BaseException) -> str:
    """Where in a file an error arose, as in `:12`."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f":{error.lineno}"
    line, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            line = f":{trace.tb_lineno}"
        trace = trace.tb_next
    return line


@functools.cache
def _with_defaults(part: Any) -> Any:
    """A part as it is where nobody sets anything: made and checked once, since a tree asks for it often."""
    return part()


@dataclass(frozen=True)
class PartSettings(Mapping[str, Any]):
    """The settings of all parts of a kind, by name: those that differ from the defaults, and defaults."""

    kind: str
    given: Mapping[str, Part] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        part: Any = get(self.kind, name)
        return self.given.get(part.name) or _with_defaults(part)

    def __iter__(self) -> Iterator[str]:
        return iter(names(self.kind))

    def __len__(self) -> int:
        return len(names(self.kind))

    def __hash__(self) -> int:
        return hash((self.kind, tuple(sorted(self.given.items()))))

    def override(self, name: str, values: Mapping[str, Any]) -> "PartSettings":
        """A copy with fields of one part replaced.

        Raises:
            UserError: no such part or field, or a value that is not allowed.
        """
        name = name.replace("_", "-")
        part = self[get(self.kind, name, f"{self.kind}s").name]
        for key in values:
            known = {entry.name for entry in dataclasses.fields(part)}
            require(key in known, "config field", f"{part.section}.{key}", "no such field")
        changed = dataclasses.replace(part, **values)
        others = {known: held for known, held in self.given.items() if known != part.name}
        is_default = changed == type(part)()
        return PartSettings(self.kind, others if is_default else others | {part.name: changed})
