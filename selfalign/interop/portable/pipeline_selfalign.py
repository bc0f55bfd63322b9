"""Samples of a SiT that selfalign trained; needs torch and diffusers alone.

from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
images = pipeline(class_labels=[0, 1, 2], guidance_scale=2.0).images
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

LAST_STEP = 0.04
"""t where the last step of the SDE starts (SiT, REPA)."""


class SelfAlignPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers is not typed
    """From noise to images.

    Args:
        transformer: predicts dx/dt, t = 1 being noise.
        vae: turns latents into images; left out where the model's samples are images.
        path: from data to noise: linear or cosine.
        class_names: by label, as text.
        latent_scale, latent_shift: the model sees latents · scale + shift; numbers, or one per channel.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012 – diffusers adds to such a list

    def __init__(
        self,
        transformer: Any,
        vae: Any = None,
        path: str = "linear",
        class_names: dict[str, str] | None = None,
        latent_scale: float | list[float] = 1.0,
        latent_shift: float | list[float] = 0.0,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(
            path=path,
            class_names=class_names,
            latent_scale=latent_scale,
            latent_shift=latent_shift,
        )

    def labels_of(self, names: str | Sequence[str]) -> list[int]:
        """Labels by class name."""
        known = {name: int(label) for label, name in (self.config.class_names or {}).items()}
        return [known[name] for name in ([names] if isinstance(names, str) else names)]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | None = None,
        num_images: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        solver: str = "euler",
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Samples.

        Args:
            class_labels: one per image; of an unconditional model left out.
            num_images: how many, where there are no labels.
            num_inference_steps: steps of the solver.
            guidance_scale: of classifier-free guidance; 1 is off.
            guidance_interval: steps that start at a t within these bounds are guided.
            solver: euler, heun (for the ODE) or sde (Euler–Maruyama).
            generator: where noise comes from.
            latents: the noise to start from (B, C, H, W), instead of drawing it.
            output_type: pil, np, pt (images from 0 to 1) or latent.
            return_dict: whether `.images` holds them, or a tuple.
        """
        model, config = self.transformer, self.transformer.config
        labels = [class_labels] if isinstance(class_labels, int) else class_labels
        if (labels is None) == bool(config.num_classes):
            raise ValueError(
                f"class_labels is {class_labels}: the model has {config.num_classes} classes"
            )
        count = num_images if labels is None else len(labels)
        shape = (count, config.channels, *config.image_size)
        device = self._execution_device
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device)
        x = latents.to(device, torch.float32 if device.type == "mps" else torch.float64)
        condition = None if labels is None else torch.tensor(list(labels), device=device)
        null = None if condition is None else torch.full_like(condition, config.num_classes)

        def velocity(x: Tensor, t: float, scale: float) -> Tensor:
            timesteps = torch.full((len(x),), t, dtype=model.dtype, device=device)
            v = model(x.to(model.dtype), timesteps, condition).to(x)
            if scale == 1:
                return v
            unguided = model(x.to(model.dtype), timesteps, null).to(x)
            return unguided + scale * (v - unguided)

        times = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64).tolist()
        if solver == "sde":
            starts = torch.linspace(1, LAST_STEP, num_inference_steps, dtype=torch.float64)
            times = [*starts.tolist(), 0.0]
        elif solver not in ("euler", "heun"):
            raise ValueError(f"solver is {solver!r}: allowed are euler, heun, sde")
        low, high = guidance_interval
        steps = list(itertools.pairwise(times))
        for t, t_next in self.progress_bar(steps):
            scale = guidance_scale if low <= t <= high else 1.0
            v = velocity(x, t, scale)
            if solver == "sde":
                drift = v - t * self._score(v, x, t)
                x = x + (t_next - t) * drift
                if t_next > 0:
                    noise = randn_tensor(shape, generator=generator, device=device)
                    x = x + math.sqrt(2 * t * (t - t_next)) * noise.to(x)
            elif solver == "heun" and t_next > 0:
                ahead = velocity(x + (t_next - t) * v, t_next, scale)
                x = x + (t_next - t) * (v + ahead) / 2
            else:
                x = x + (t_next - t) * v
        images = self._finish(x.float(), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _score(self, velocity: Tensor, x: Tensor, t: float) -> Tensor:
        """∇ log p_t(x) from the velocity, on the path of the training."""
        if self.config.path == "cosine":
            angle = math.pi * t / 2
            noise = math.sin(angle) * x + math.cos(angle) * velocity * 2 / math.pi
            return -noise / math.sin(angle)
        return -(x + (1 - t) * velocity) / t

    def _finish(self, x: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
        if self.vae is not None:
            scale, shift = (
                torch.tensor(value, device=x.device).reshape(-1, 1, 1)
                for value in (self.config.latent_scale, self.config.latent_shift)
            )
            x = self.vae.decode(((x - shift) / scale).to(self.vae.dtype)).sample.float()
        images = (x.clamp(-1, 1) + 1) / 2
        if output_type == "pt":
            return images
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        return arrays if output_type == "np" else self.numpy_to_pil(arrays)
