"""Files that `selfalign export --format diffusers` copies: they need torch and diffusers, nothing else."""
