"""The analyses by name. Imports no torch, so that the command's help is there at once."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selfalign.evaluation.config import Progress
    from selfalign.inspect.section import About, Section
    from selfalign.inspect.subject import Subject

ANALYSES = {
    "batch": "what a batch of training contains: timesteps, gaps, context, distinct views",
    "views": "pictures of what student and teacher see of an image",
    "timesteps": "loss of a token over its own and the other group's timestep",
    "probes": "linear probe accuracy by block and timestep",
    "pca": "principal components of token features, as maps and in numbers",
    "attention": "attention maps, and attention across noise levels",
    "interventions": "the same weights with something changed in what they see",
    "similarity": "CKA and CKNNA between blocks, student and teacher, and an encoder",
    "alignment": "how alike student and teacher are, by block and over training",
    "labels": "label reliance over t",
}
"""Each is a module of this package with a function `look(subject, progress) -> Section`; in the order of
the page."""


def look(name: str, subject: "Subject", progress: "Progress") -> "Section":
    """What one analysis finds.

    Args:
        name: one of ANALYSES.
        subject: the model, its data and its settings.
        progress: told of long work.
    """
    module = importlib.import_module(f"selfalign.inspect.{name}")
    about: About = module.ABOUT
    config = subject.config
    if config.padded and not about.pads:
        return about.left_out("it looks at samples that are equally long, and these are not")
    if about.needs_all_tokens and config.views.drops_groups:
        return about.left_out("the student does not see all tokens of an image: a group is dropped")
    if about.mixes_timesteps and not config.backbone.mixes_timesteps:
        return about.left_out(
            f"model.backbone {config.model.backbone} sees one timestep per sequence, and groups that see "
            "each other are shown two"
        )
    section: Section = module.look(subject, progress)
    return section
