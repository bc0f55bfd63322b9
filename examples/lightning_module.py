"""A SiT in a LightningModule: `python examples/lightning_module.py [STEPS]`; needs lightning."""

import sys
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import selfalign
from selfalign.data.datasets import open_data

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 1000


class SelfAligned(lightning.LightningModule):
    """Student, average and objective of a recipe.

    Args:
        config: a resolved tree.
    """

    def __init__(self, config: selfalign.ResolvedConfig) -> None:
        super().__init__()
        self.config = config
        self.student = selfalign.build_student(config)
        self.ema = selfalign.EMA(self.student, decay=0.995)
        self.average = self.ema.model  # a child, so that it moves and is saved with the student
        self.objective = selfalign.Objective(config)

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        """The weighted sum of all terms; each of them is logged."""
        images, labels = batch
        seed = (0, "views", self.global_step, self.global_rank)
        generator = selfalign.make_generator(*seed, device=self.device)
        draw = selfalign.draw_views(self.config, images, generator)
        losses = self.objective(self.student, self.average, images, labels, draw, self.global_step)
        self.log_dict({f"{name}_loss": value for name, value in losses.means().items()})
        return losses.total

    def optimizer_step(self, *arguments: Any, **settings: Any) -> None:
        """The average follows the weights."""
        step = self.global_step
        super().optimizer_step(*arguments, **settings)
        self.ema.update(step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over what is trained."""
        return torch.optim.AdamW(self.student.parameters(), lr=1e-3, weight_decay=0)


recipe = selfalign.recipe("sra-dts-as", {"model.size": "tiny", "data.name": "digits"})
source = open_data(recipe.data)
config = selfalign.resolve(recipe, source.channels, source.image_size, source.num_classes)
images, labels = source.train.read(range(len(source.train)))
loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True, drop_last=True)
module = SelfAligned(config)
trainer = lightning.Trainer(
    max_steps=STEPS,
    gradient_clip_val=1.0,
    logger=False,
    enable_checkpointing=False,
    enable_model_summary=False,
)
trainer.fit(module, loader)
module.average.save_pretrained("lightning_module")
