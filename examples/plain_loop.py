"""Train a SiT in a loop of your own: `python examples/plain_loop.py [STEPS]`, on handwritten digits."""

import sys

import torch

import selfalign
from selfalign.data.datasets import open_data

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 1000

recipe = selfalign.recipe("sra-dts-as", {"model.size": "tiny", "data.name": "digits"})
source = open_data(recipe.data)
config = selfalign.resolve(recipe, source.channels, source.image_size, source.num_classes)
student = selfalign.build_student(config)
ema = selfalign.EMA(student, decay=0.995)
objective = selfalign.Objective(config)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0)

losses = None
for step in range(STEPS):
    chosen = torch.randint(
        len(source.train), (64,), generator=selfalign.make_generator(0, "batch", step)
    )
    images, labels = source.train.read(chosen.tolist())
    draw = selfalign.draw_views(config, images, selfalign.make_generator(0, "views", step))
    losses = objective(student, ema.model, images, labels, draw, step)
    optimizer.zero_grad()
    losses.total.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    ema.update(step)
    if step % 100 == 0:
        means = {name: round(value.item(), 4) for name, value in losses.means().items()}
        print(f"step {step}: {means}")

ema.model.save_pretrained("plain_loop")  # SiT.from_pretrained("plain_loop") opens it
