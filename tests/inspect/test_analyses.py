"""Analyses say what they leave out before they compute anything."""

from types import SimpleNamespace

import pytest
from support import resolved

from selfalign.inspect.analyses import ANALYSES, look

CANNOT = {
    "a group is dropped": ({"padded": False, "drops_groups": True}, {"alignment"}),
    "one timestep per sequence": (
        {"padded": False, "mixes_timesteps": False},
        {"timesteps", "attention", "interventions"},
    ),
    "equally long": ({"padded": True}, set(ANALYSES) - {"labels"}),
}


@pytest.mark.parametrize("reason", list(CANNOT))
def test_what_a_recipe_cannot_show(reason, monkeypatch):
    facts, names = CANNOT[reason]
    config = SimpleNamespace(
        padded=facts["padded"],
        views=SimpleNamespace(drops_groups=facts.get("drops_groups", False)),
        backbone=SimpleNamespace(mixes_timesteps=facts.get("mixes_timesteps", True)),
        model=SimpleNamespace(backbone="diffusers"),
    )
    left_out = set()
    for name in ANALYSES:
        monkeypatch.setattr(f"selfalign.inspect.{name}.look", lambda *_: None)
        section = look(name, SimpleNamespace(config=config), lambda *_: None)
        if section is not None:
            assert len(section.notes) == 1 and reason in section.notes[0]
            left_out.add(name)
    assert left_out == names


def test_what_a_backbone_and_a_recipe_say():
    hidden = {"views.mask_ratios": (0.75, 0.25), "views.hidden_groups": 1}
    config = resolved("sra-dts", hidden)
    assert config.views.drops_groups and config.backbone.mixes_timesteps
    passing = resolved("sra-dts", {**hidden, "views.skipped_blocks": (2, 5)})
    assert not passing.views.drops_groups
