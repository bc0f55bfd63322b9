"""Parts: found by kind and name, registered by files within the package and outside of it."""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

from selfalign import (
    RunConfig,
    TokenGrid,
    UserError,
    load_plugin,
    make_generator,
    override,
    parts,
    recipe,
)
from selfalign.config import config_from_dict, config_to_dict
from selfalign.partitions import Partition, Ungrouped
from selfalign.partitions.random import Random
from selfalign.parts import PartSettings, register
from selfalign.schedules import Schedule

pytestmark = pytest.mark.usefixtures("forget_parts")

PLUGIN = '''
from dataclasses import dataclass

from selfalign import register
from selfalign.partitions import Partition, Ungrouped


@register("{name}")
@dataclass(frozen=True)
class Halves(Partition):
    """The image's first tokens, or its last ones."""

    shift: int = 0
    """Tokens that the cut is moved by."""
    side: str = "first"
    """Which come first."""

    def check(self):
        """Limits."""
        self.require_number("shift", 0, 10, "a number from 0 to 10")

    def order(self, batch):
        """In image order."""
        import torch

        return torch.arange(batch.grid.num_tokens).roll(self.shift).expand(batch.samples, -1)
'''
GROUPS = {"views.mask_ratios": (0.5, 0.5)}


def plugin(folder, text=None, file="halves.py", name="halves"):
    """A user's file."""
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(PLUGIN.format(name=name) if text is None else text)
    return path


def refusal(function, *arguments):
    """What a UserError says, in one line."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


class TestNames:
    @pytest.mark.parametrize("kind", parts.HOMES)
    def test_every_kind_has_parts_with_settings_that_are_explained(self, kind):
        assert parts.names(kind) == tuple(sorted(parts.names(kind))) != ()
        for name in parts.names(kind):
            part = parts.get(kind, name)
            assert (part.kind, part.name, part.section) == (
                kind,
                name,
                f"{parts.SECTIONS[kind]}.{name}",
            )
            assert part.__doc__
            part()  # all settings have defaults

    @pytest.mark.parametrize(
        ("kind", "older", "name"), [("schedule", "dual", "independent")], ids=str
    )
    def test_older_names_are_understood(self, kind, older, name):
        assert older in parts.older_names(kind) and older not in parts.names(kind)
        assert parts.get(kind, older) is parts.get(kind, name)

    def test_unknown_names_are_refused_with_the_known_ones(self):
        message = refusal(parts.get, "partition", "rings")
        assert message.startswith("partition is 'rings': allowed are ")
        assert all(name in message for name in (*parts.names("partition"), "--plugins"))
        assert refusal(parts.get, "partition", "rings", "views.partition").startswith(
            "views.partition is 'rings'"
        )

    def test_of_one_kind_are_not_names_of_another(self):
        assert "allowed are" in refusal(parts.get, "schedule", "random")

    def test_one_of_several_names_that_is_unknown_is_refused(self):
        message = refusal(override, RunConfig(), {"objective.terms": ("dispersive", "attractive")})
        assert message.startswith("objective.terms is 'attractive': allowed are ")


class TestRegister:
    @pytest.mark.parametrize("taken", ["random", "blocks"])
    def test_a_name_that_another_module_has_is_refused(self, taken):
        @dataclass(frozen=True)
        class Mine(Partition):
            """Another one."""

        message = refusal(register(taken), Mine)
        assert message == (
            f"partition {taken!r} of {__name__}: selfalign.partitions.{taken} has one of that name"
        )
        assert parts.get("partition", taken) is not Mine

    def test_so_is_an_older_name_and_an_alias_that_hides_a_part(self):
        @dataclass(frozen=True)
        class Mine(Schedule):
            """Another one."""

        for decorate in (register("dual"), register("mine", aliases=("single",))):
            assert "has one of that name" in refusal(decorate, Mine)
        assert parts.get("schedule", "dual") is parts.get("schedule", "independent")
        assert "mine" not in parts.names("schedule")

    @pytest.mark.parametrize("name", ["", "my_term", "a.b", "a b", "Upper", "ünder"])
    def test_names_that_make_no_option_are_refused(self, name):
        @dataclass(frozen=True)
        class Mine(Partition):
            """Another one."""

        assert refusal(register(name), Mine) == (
            f"partition is {name!r}: allowed are lower-case letters, digits and -"
        )

    def test_the_same_module_may_register_again(self):
        for _ in range(2):

            @register("again")
            @dataclass(frozen=True)
            class Mine(Partition):
                """As notebooks do when a cell is run twice."""

        assert parts.get("partition", "again") is Mine

    def test_a_plugin_cannot_be_first_to_take_a_name_of_the_package(self, tmp_path):
        path = plugin(tmp_path, name="stripes")
        script = f"from selfalign import load_plugin; load_plugin({str(path)!r})"
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
        )
        assert "selfalign.partitions.stripes has one of that name" in done.stderr


class TestPlugins:
    def test_a_plugins_part_is_one_like_all_others(self, tmp_path):
        path = plugin(tmp_path)
        tree = override(
            RunConfig(),
            {
                "plugins": (str(path),),
                "views.partition": "halves",
                "partitions.halves.shift": 3,
                **GROUPS,
            },
        )
        assert tree.plugins == (str(path),)
        assert "halves" in parts.names("partition")
        assert (tree.partition.shift, tree.partition.side) == (3, "first")
        order = tree.partition.order(
            Ungrouped(TokenGrid((2, 4), 1), (4, 4), 2, make_generator(0, "order"))
        )
        assert order.tolist() == [[5, 6, 7, 0, 1, 2, 3, 4]] * 2

    def test_its_settings_have_a_place_in_the_tree_and_come_back(self, tmp_path):
        path = plugin(tmp_path)
        changes = {"plugins": (str(path),), "views.partition": "halves", **GROUPS}
        tree = recipe("sra-dts-as", {**changes, "partitions.halves.shift": 3})
        values = config_to_dict(tree)
        assert values["partitions"] == {"halves": {"shift": 3, "side": "first"}}
        assert config_from_dict(json.loads(json.dumps(values))) == tree

    def test_a_tree_that_names_its_plugin_comes_back_in_a_new_process(self, tmp_path):
        changes = {"plugins": (str(plugin(tmp_path)),), "views.partition": "halves", **GROUPS}
        values = json.dumps(config_to_dict(recipe("sra-dts-as", changes)))
        script = (
            "import json, sys; from selfalign.config import config_from_dict; "
            "print(config_from_dict(json.load(sys.stdin)).partition)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            input=values,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout == "Halves(shift=0, side='first')\n", done.stderr

    @pytest.mark.parametrize(
        ("setting", "value", "words"),
        [
            ("shift", "3", "partitions.halves.shift is '3': allowed are a whole number"),
            ("shift", 11, "partitions.halves.shift is 11: allowed is a number from 0 to 10"),
            ("side", 1, "partitions.halves.side is 1: allowed are a text"),
            ("colour", 1, "config field is 'partitions.halves.colour': no such field"),
        ],
    )
    def test_its_settings_are_checked(self, tmp_path, setting, value, words):
        changes = {"plugins": (str(plugin(tmp_path)),), f"partitions.halves.{setting}": value}
        assert refusal(override, RunConfig(), changes) == words

    def test_is_run_once_and_by_its_whole_path(self, tmp_path, monkeypatch):
        count = tmp_path / "count.txt"
        text = f"from pathlib import Path\nwith Path({str(count)!r}).open('a') as file:\n    "
        path = plugin(tmp_path, text + "file.write('x')\n", "counted.py")
        monkeypatch.chdir(tmp_path)
        found = {load_plugin(str(path)), load_plugin("counted.py"), load_plugin("./counted.py")}
        assert found == {path}
        assert count.read_text() == "x"

    def test_two_files_of_the_same_name_stand_side_by_side(self, tmp_path):
        for name in ("one", "two"):
            load_plugin(str(plugin(tmp_path / name, file="mine.py", name=name)))
        one, two = (parts.get("partition", name) for name in ("one", "two"))
        assert one is not two and one.__module__ != two.__module__
        assert one.__module__ in sys.modules and two.__module__ in sys.modules

    def test_two_files_with_the_same_part_do_not(self, tmp_path):
        load_plugin(str(plugin(tmp_path / "one")))
        message = refusal(load_plugin, str(plugin(tmp_path / "two")))
        assert message.startswith("partition 'halves' of ") and "has one of that name" in message

    def test_a_file_that_is_not_there_is_named(self, tmp_path):
        path = str(tmp_path / "nothing.py")
        assert refusal(load_plugin, path) == f"plugins is {path!r}: there is no such file"
        assert refusal(load_plugin, str(tmp_path)) == (
            f"plugins is {str(tmp_path)!r}: there is no such file"
        )

    def test_a_file_that_is_no_python_is_refused(self, tmp_path):
        path = plugin(tmp_path, "a = 1", "parts.txt")
        assert refusal(load_plugin, str(path)) == f"plugins is {str(path)!r}: must be a .py file"

    @pytest.mark.parametrize(
        ("text", "line", "error"),
        [
            ("a = 1\nb = = 2\n", 2, "SyntaxError: invalid syntax"),
            ("a = 1\n\n\nb = a + 'x'\n", 4, "TypeError: unsupported operand"),
            ("import nothing_of_that_name\n", 1, "ModuleNotFoundError: No module named"),
            # an error deeper down: the last line of the file itself that was running
            ("def f():\n    return int('x')\n\n\nf()\n", 2, "ValueError: invalid literal"),
            ("import json\n\njson.loads('{')\n", 3, "JSONDecodeError"),
        ],
    )
    def test_a_file_that_fails_is_named_with_its_line(self, tmp_path, text, line, error):
        path = plugin(tmp_path, text, "wrong.py")
        message = refusal(load_plugin, str(path))
        assert message.startswith(f"plugins: {path}:{line} fails: {error}")

    def test_a_file_that_failed_may_be_loaded_once_it_is_mended(self, tmp_path):
        path = plugin(tmp_path, PLUGIN.format(name="halves") + "\n1 / 0\n")
        assert "ZeroDivisionError" in refusal(load_plugin, str(path))
        plugin(tmp_path, PLUGIN.format(name="halves") + "\nmended = True\n")
        assert load_plugin(str(path)) == path
        assert parts.get("partition", "halves")().shift == 0

    def test_what_a_plugin_refuses_is_said_as_it_is(self, tmp_path):
        text = "from selfalign import UserError\nraise UserError('needs a licence')\n"
        assert refusal(load_plugin, str(plugin(tmp_path, text))) == "needs a licence"


class TestPartSettings:
    def test_holds_defaults_of_all_and_what_differs(self):
        settings = PartSettings("partition")
        assert set(settings) == set(parts.names("partition")) and len(settings) == len(
            list(settings)
        )
        changed = settings.override("stripes", {"width": 2})
        assert changed["stripes"].width == 2 and settings["stripes"].width == 1
        assert changed["random"] == Random()
        assert changed.given.keys() == {"stripes"}

    def test_what_is_set_back_is_as_if_never_changed(self):
        settings = PartSettings("partition")
        changed = settings.override("stripes", {"width": 2}).override("stripes", {"width": 1})
        assert changed == settings and hash(changed) == hash(settings)

    def test_older_names_are_understood(self):
        terms = PartSettings("solver").override("dopri5", {"rtol": 1e-3})
        assert terms["dopri5"].rtol == 1e-3
        assert PartSettings("schedule").override("dual", {}) == PartSettings("schedule")

    @pytest.mark.parametrize(
        ("name", "values", "words"),
        [
            ("rings", {}, "partitions is 'rings': allowed are"),
            ("stripes", {"colour": 1}, "config field is 'partitions.stripes.colour'"),
            ("stripes", {"width": 0}, "partitions.stripes.width is 0"),
        ],
    )
    def test_refused(self, name, values, words):
        assert refusal(PartSettings("partition").override, name, values).startswith(words)


def test_the_help_of_settings_needs_no_torch():
    script = (
        "import sys; from selfalign import parts; import selfalign.config; "
        "[parts.get(kind, name)() for kind in parts.HOMES for name in parts.names(kind)]; "
        "print(sorted({'torch', 'scipy', 'sklearn', 'matplotlib', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr
