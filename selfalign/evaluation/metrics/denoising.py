"""The held-out denoising loss: compares runs with little noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from selfalign.evaluation.metrics import Available, Evidence, Finding, Metric, Need

if TYPE_CHECKING:
    from selfalign.training.heldout import HeldOutLoss

PAIRS = 4000
"""Pairs of a held-out image and a timestep, the same for all runs on a data set."""


def _missing(available: Available) -> str | None:
    return None if available.run else "a run, not samples"


class Denoising(Metric):
    """Eq. 2 on held-out images, of EMA and raw weights."""

    name = "denoising"
    values: ClassVar = {}
    needs = (Need(_missing), Need(lambda a: a.run_data, noted=True))
    reads = frozenset()

    def measure(self, evidence: Evidence) -> Finding:
        """See `heldout_loss`."""
        from selfalign.runs.load import load_run
        from selfalign.training.heldout import heldout_loss

        setup = evidence.setup
        assert setup.run is not None and setup.source is not None
        losses: dict[str, HeldOutLoss] = {}
        kinds: tuple[Literal["ema", "raw"], ...] = ("ema", "raw")
        for done, weights in enumerate(kinds):
            setup.progress("denoising loss", done, len(kinds))
            run = load_run(setup.run.folder, weights, setup.accelerator.device, step=setup.run.step)
            model = run.model
            losses[weights] = heldout_loss(
                model, setup.source.heldout, setup.run.config.flow.path, PAIRS
            )
        setup.progress("denoising loss", len(kinds), len(kinds))
        return Finding(losses=losses)
