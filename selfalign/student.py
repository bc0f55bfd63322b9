"""The student: a backbone with the heads of all terms, as one module."""

from selfalign.config import ResolvedConfig
from selfalign.network import Backbone
from selfalign.randomness import make_generator


def build_student(config: ResolvedConfig) -> Backbone:
    """The model that a resolved tree describes. Its weights are a function of the tree's seed."""
    student: Backbone = config.backbone.build(config)
    for term in config.used_terms().values():
        for name, (tap, head) in term.heads(config, student).items():
            student.add_head(name, head, tap)
    student.initialize_weights(make_generator(config.seed, "weights"))
    return student
