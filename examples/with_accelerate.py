"""The same loop on any number of devices: `accelerate launch examples/with_accelerate.py [STEPS]`."""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

import selfalign
from selfalign.data.datasets import open_data

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 1000

# Buffers are constants; processes need not send them to each other.
accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
recipe = selfalign.recipe("sra-dts-as", {"model.size": "tiny", "data.name": "digits"})
source = open_data(recipe.data)
config = selfalign.resolve(recipe, source.channels, source.image_size, source.num_classes)
student = selfalign.build_student(config).to(accelerator.device)
ema = selfalign.EMA(student, decay=0.995)
objective = selfalign.Objective(config)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0)
model, optimizer = accelerator.prepare(
    student, optimizer
)  # the objective calls it as it calls a student

rank, share = accelerator.process_index, 64 // accelerator.num_processes
for step in range(STEPS):
    # Every process draws images and views of its own: what is drawn is a function of (seed, step, rank).
    order = selfalign.make_generator(0, "batch", step, rank)
    images, labels = source.train.read(
        torch.randint(len(source.train), (share,), generator=order).tolist()
    )
    images, labels = images.to(accelerator.device), labels.to(accelerator.device)
    views = selfalign.make_generator(0, "views", step, rank, device=accelerator.device)
    draw = selfalign.draw_views(config, images, views)
    with accelerator.autocast():
        losses = objective(model, ema.model, images, labels, draw, step)
    optimizer.zero_grad()
    accelerator.backward(losses.total)
    accelerator.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    ema.update(step)
    if step % 100 == 0:
        accelerator.print(f"step {step}: loss {losses.total.item():.4f}")

if accelerator.is_main_process:
    ema.model.save_pretrained("with_accelerate")
