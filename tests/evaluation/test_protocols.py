"""Protocols by name: what they set, and that options which are given win."""

import subprocess
import sys

import pytest

from selfalign.cli.evaluate import _parse
from selfalign.evaluation.protocols import PROTOCOLS


@pytest.mark.parametrize("name", PROTOCOLS)
def test_sets_what_it_says(name: str) -> None:
    protocol = PROTOCOLS[name]
    parsed = _parse([*protocol.options(), "runs/x"])
    config, sampling = parsed.config, parsed.sampling
    assert (config.reference, config.features) == (protocol.reference, protocol.features)
    assert (config.num, config.labels) == (50_000, protocol.labels)
    assert config.inception_splits == 10
    if protocol.solver is not None:
        for setting in (
            "solver",
            "steps",
            "guidance_scale",
            "guidance_interval",
            "guidance_channels",
        ):
            assert getattr(sampling, setting) == getattr(protocol, setting)


def test_options_that_are_given_win() -> None:
    given = ["runs/x", "--steps", "7", "--labels", "3", "4", "--guidance-interval", "0.2", "0.3"]
    parsed = _parse([*PROTOCOLS["sit"].options(), *given])
    assert parsed.sampling.steps == 7 and parsed.config.labels == (3, 4)
    assert parsed.sampling.guidance_interval == (0.2, 0.3)
    assert parsed.sampling.guidance_scale == 1.5  # SiT's, which nothing else set
    assert parsed.sampling.guidance_channels == "first-three"


def test_what_is_told_is_what_is_in_force() -> None:
    for name, protocol in PROTOCOLS.items():
        parsed = _parse([*protocol.options(), "runs/x"])
        assert protocol.overridden(parsed.config, parsed.sampling) == protocol, name
    given = ["runs/x", "--guidance-scale", "1", "--num", "16", "--labels", "3", "4"]
    parsed = _parse([*PROTOCOLS["paper-512"].options(), *given])
    told = PROTOCOLS["paper-512"].overridden(parsed.config, parsed.sampling).options()
    assert _parse([*told, "runs/x"]) == parsed
    assert told[told.index("--num") + 1] == "16" and "--steps" in told
    assert "--solver" not in PROTOCOLS["adm"].overridden(parsed.config, parsed.sampling).options()


def test_settings_import_no_torch() -> None:
    """`selfalign evaluate --help` needs these modules; the package's own front door is left aside."""
    code = """
import sys, types
from importlib.util import find_spec
package = types.ModuleType("selfalign")
package.__path__ = find_spec("selfalign").submodule_search_locations
sys.modules["selfalign"] = package
import selfalign.evaluation.config, selfalign.evaluation.protocols
heavy = {"torch", "scipy", "sklearn", "timm", "torchvision", "matplotlib"} & sys.modules.keys()
assert not heavy, heavy
"""
    # find_spec imports nothing but the finder's own parts.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
