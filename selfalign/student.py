"""The student: a backbone with the heads of all terms, as one module."""

from selfalign.config import ResolvedConfig
from selfalign.network import Backbone
from selfalign.randomness import make_generator


def build_student(config: ResolvedConfig) -> Backbone:
    """The model that a resolved tree describes. Its weights are a function of the tree's seed.

    Raises:
        UserError: a part takes features of a module that the backbone does not have.
    """
    student = assemble_student(config)
    student.initialize_weights(make_generator(config.seed, "weights"))
    return student


def assemble_student(config: ResolvedConfig) -> Backbone:
    """The model that a resolved tree describes, with weights that nobody has set yet.

    Raises:
        UserError: a part takes features of a module that the backbone does not have.
    """
    student: Backbone = config.backbone.build(config)
    for term in config.used_terms().values():
        student.require_taps(term.taps(config), term.section)
        for name, (tap, head) in term.heads(config, student).items():
            student.require_taps([tap], term.section)
            student.add_head(name, head, tap)
    for target in config.used_targets().values():
        student.require_taps((*target.taps(config), *target.teacher_taps(config)), target.section)
    return student
