"""Models that are saved as the Hugging Face hub has them, sent there, and loaded from there."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor

from selfalign.card import model_card
from selfalign.conditions import Condition
from selfalign.conditions.label import Label
from selfalign.errors import UserError
from selfalign.network import Backbone
from selfalign.tokens import TokenGrid
from selfalign.weights import write_safetensors


class Pretrained(Backbone, PyTorchModelHubMixin):
    """A backbone that `from_pretrained` makes again from its config and weights."""

    def __init__(
        self, grid: TokenGrid, channels: int, condition: Condition, num_classes: int
    ) -> None:
        super().__init__(grid, channels, condition, num_classes)
        self._hub_mixin_config = None  # made when it is asked for, from the model itself

    def hub_config(self) -> dict[str, Any]:
        """The arguments that make this model again, as JSON can hold them."""
        raise NotImplementedError

    def plain_state(self) -> dict[str, Tensor]:
        """The weights without those of heads and of hidden tokens, which training alone needs."""
        left_out = ("mask_token", *(f"{name.partition('.')[0]}." for name in self.head_taps))
        state = self.state_dict()
        return {name: value for name, value in state.items() if not name.startswith(left_out)}

    def save_pretrained(self, save_directory: Path | str, **settings: Any) -> str | None:
        """Write config.json, model.safetensors and README.md, as the hub has them.

        Args:
            save_directory: the folder.
            settings: as of `PyTorchModelHubMixin`; `model_card_kwargs` from `card_facts`.

        Raises:
            UserError: it is conditioned on something else than labels, which a config does not say.
        """
        if type(self.condition) is not Label:
            raise UserError(
                f"condition is {self.condition.name!r}: the hub's form holds labels alone"
            )
        settings["config"] = settings.get("config") or self.hub_config()
        return super().save_pretrained(save_directory, **settings)

    def push_to_hub(self, repo_id: str, **settings: Any) -> str:
        """Send what `save_pretrained` writes to a repository, whose name the card says.

        Args:
            repo_id: OWNER/NAME; made if it is not there.
            settings: as of `PyTorchModelHubMixin`; `model_card_kwargs` from `card_facts`.

        Raises:
            UserError: what `save_pretrained` raises.
        """
        facts = {**(settings.pop("model_card_kwargs", None) or {}), "repo_id": repo_id}
        return super().push_to_hub(repo_id, model_card_kwargs=facts, **settings)

    def _save_pretrained(self, save_directory: Path) -> None:
        # SRA's releases have this package's names, time and sign.
        facts = {"format": "pt", "from": "sra"}
        write_safetensors(save_directory / "model.safetensors", self.plain_state(), facts)

    @classmethod
    def _from_pretrained(cls, **settings: Any) -> "Pretrained":
        # Weights that do not fit are an error, and not left out.
        return super()._from_pretrained(**{**settings, "strict": True})

    def generate_model_card(self, *_: Any, **facts: Any) -> ModelCard:
        """See `selfalign.card.model_card`."""
        repository = facts.pop("repo_id", None)
        return ModelCard(model_card(where=repository or ".", **facts))
