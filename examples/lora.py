"""Fine-tune a run by low-rank adapters: `python examples/lora.py RUN OUT [STEPS]`; needs `pip install peft`.

RUN is a folder of `selfalign train` or `selfalign import`. OUT/adapter holds the adapter alone, as peft reads
it; OUT/merged a whole model for `SiT.from_pretrained`, whose weights `selfalign train --init` starts from.
"""

import sys
from pathlib import Path

import peft
import torch

import selfalign
from selfalign.data.datasets import open_data

run = selfalign.load_run(Path(sys.argv[1]))
out = Path(sys.argv[2])
steps = int(sys.argv[3]) if len(sys.argv) > 3 else 200

config, source = run.config, open_data(run.config.data)
student, teacher = run.model.train(), selfalign.load_run(run.folder).model
# Attention and MLP of every block get an adapter of rank 8; all other weights stay as they are.
places = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
adapted = peft.get_peft_model(student, peft.LoraConfig(r=8, lora_alpha=16, target_modules=places))
trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
print(
    f"{sum(p.numel() for p in trained):,} of {sum(p.numel() for p in student.parameters()):,} weights"
)

objective = selfalign.Objective(config)
optimizer = torch.optim.AdamW(trained, lr=1e-3)
for step in range(steps):
    chosen = torch.randint(
        len(source.train), (64,), generator=selfalign.make_generator(0, "batch", step)
    )
    images, labels = source.train.read(chosen.tolist())
    draw = selfalign.draw_views(config, images, selfalign.make_generator(0, "views", step))
    loss = objective(student, teacher, images, labels, draw, step).total
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.4f}")

adapted.save_pretrained(out / "adapter")
adapted.merge_and_unload().save_pretrained(out / "merged")
