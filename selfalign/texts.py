"""What reads captions: from their numbers to a vector each, and to tokens that others attend to."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from selfalign.errors import UserError
from selfalign.masked import attend
from selfalign.ops.modules import Linear
from selfalign.weights import listed

PADDING, BEGIN, FIRST_BYTE = 0, 1, 2
"""Of the byte alphabet: what fills up, what every caption begins with, and the byte 0."""
POOLER = "pooler."
"""Of weights that are not asked for, and that many files lack."""
LONGEST_REASON = 300
"""Letters of what transformers says of a folder that is no model."""
AT_ONCE = 64
"""Captions that a frozen encoder reads together."""


class Read(NamedTuple):
    """What was read in captions."""

    vector: Float[Tensor, "B D"]
    """What the whole caption says."""
    tokens: Float[Tensor, "B L D"]
    present: Bool[Tensor, "B L"]
    """Which of the tokens are there: the others fill up."""


class TextEncoder(nn.Module):
    """Reads captions by number; `describe` tells which they are. Number `num_classes` is the empty one.

    Args:
        num_classes: captions.
        hidden_size: features D.
        length: tokens L of a caption at most.
    """

    def __init__(self, num_classes: int, hidden_size: int, length: int) -> None:
        super().__init__()
        self.num_classes, self.hidden_size, self.length = num_classes, hidden_size, length
        self.pooled = Linear(hidden_size, hidden_size)

    def describe(self, captions: Sequence[str], prompts: Sequence[str] = ()) -> None:
        """Tell which captions the numbers stand for.

        Args:
            captions: those of the data, by number; empty ones where a model has more numbers.
            prompts: further ones, from number `num_classes + 1` on.
        """
        known = list(captions[: self.num_classes])
        known += [""] * (self.num_classes - len(known))
        # Names of files and arguments may hold what is no text, which no tokenizer takes.
        told = [text.encode(errors="replace").decode() for text in (*known, "", *prompts)]
        self._remember(told)

    def _remember(self, captions: Sequence[str]) -> None:
        raise NotImplementedError

    def _read(self, captions: Int[Tensor, "B"]) -> tuple[Tensor, Bool[Tensor, "B L"]]:
        """Tokens of captions, and which of them are there."""
        raise NotImplementedError

    def forward(self, captions: Int[Tensor, "B"]) -> Read:
        """Read captions by number."""
        tokens, present = self._read(captions)
        there = present[..., None].to(tokens.dtype)
        mean = (tokens * there).sum(dim=1) / there.sum(dim=1)
        return Read(self.pooled(mean), tokens, present)


class BytesEncoder(TextEncoder):
    """A small transformer over the bytes of UTF-8, which is trained along. Arguments as above.

    Args:
        layers: of self-attention, two matrices wide.
    """

    ids: Tensor

    def __init__(self, num_classes: int, hidden_size: int, length: int, layers: int) -> None:
        super().__init__(num_classes, hidden_size, length)
        self.alphabet = nn.Embedding(FIRST_BYTE + 256, hidden_size)
        self.places = nn.Embedding(length, hidden_size)
        self.layers = nn.ModuleList(_Layer(hidden_size) for _ in range(layers))
        ids = torch.full((num_classes + 1, length), PADDING)
        ids[:, 0] = BEGIN
        self.register_buffer("ids", ids, persistent=False)

    def _remember(self, captions: Sequence[str]) -> None:
        ids = torch.full((len(captions), self.length), PADDING)
        ids[:, 0] = BEGIN
        for row, caption in zip(ids, captions, strict=True):
            found = torch.tensor(list(caption.encode()[: self.length - 1]), dtype=torch.int64)
            row[1 : 1 + len(found)] = found + FIRST_BYTE
        self.ids = ids.to(self.ids.device)

    def _read(self, captions: Int[Tensor, "B"]) -> tuple[Tensor, Bool[Tensor, "B L"]]:
        ids = self.ids[captions]
        present = ids != PADDING
        x = self.alphabet(ids) + self.places.weight
        for layer in self.layers:
            x = layer(x, present)
        return functional.layer_norm(x, x.shape[-1:]), present


class _Layer(nn.Module):
    """Self-attention of one head per 32 features, then two matrices."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.heads = max(1, hidden_size // 32)
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.proj = Linear(hidden_size, hidden_size)
        self.fc1 = Linear(hidden_size, 2 * hidden_size)
        self.fc2 = Linear(2 * hidden_size, hidden_size)

    def forward(
        self, x: Float[Tensor, "B L D"], present: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B L D"]:
        q, k, v = self.qkv(functional.layer_norm(x, x.shape[-1:])).chunk(3, dim=-1)
        x = x + self.proj(attend(q, k, v, self.heads, present))
        return x + self.fc2(functional.silu(self.fc1(functional.layer_norm(x, x.shape[-1:]))))


class TransformersEncoder(TextEncoder):
    """A frozen text encoder of the library transformers; a matrix brings its features to the model's width.

    It reads every caption once, in `describe`, and is not kept. Arguments as above.

    Args:
        name: of the model, or its folder.
    """

    features: Tensor
    present: Tensor

    def __init__(self, num_classes: int, hidden_size: int, length: int, name: str) -> None:
        super().__init__(num_classes, hidden_size, length)
        self.name = name
        width = _settings_of(name)
        self.project = Linear(width, hidden_size)
        shape = (num_classes + 1, length)
        self.register_buffer("features", torch.zeros(*shape, width), persistent=False)
        self.register_buffer("present", torch.ones(shape, dtype=torch.bool), persistent=False)

    @torch.no_grad()
    def _remember(self, captions: Sequence[str]) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # of weights that are not asked for
        logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.name)
            model, told = AutoModel.from_pretrained(self.name, output_loading_info=True)
        except Exception as error:  # transformers raises nearly anything for a damaged folder
            raise _not_there(self.name, error) from error
        # Of models that also write, or see, only what reads is asked.
        encoder = getattr(model, "text_model", model)
        if hasattr(model, "decoder"):
            encoder = model.encoder
        own = {id(weight) for weight in encoder.parameters()}
        names = {name for name, weight in model.named_parameters() if id(weight) in own}
        missing = names & set(told["missing_keys"])
        if lacking := sorted(name for name in missing if POOLER not in name):
            raise _not_there(self.name, ValueError(f"its weights lack {listed(lacking)}"))
        encoder = encoder.to(self.features.device).eval()
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:  # as of GPT-2: whatever it is, nothing attends to it
            tokenizer.pad_token = tokenizer.eos_token
        features, present = [], []
        for first in range(0, len(captions), AT_ONCE):
            try:
                texts = tokenizer(
                    list(captions[first : first + AT_ONCE]),
                    padding="max_length",
                    truncation=True,
                    max_length=self.length,
                    return_tensors="pt",
                ).to(self.features.device)
                mask = texts["attention_mask"]
                read = encoder(input_ids=texts["input_ids"], attention_mask=mask).last_hidden_state
            except Exception as error:  # what a tokenizer or a model of any kind cannot do
                wanted = f"it cannot read captions of conditions.text.length {self.length} tokens: {error}"
                raise _not_there(self.name, ValueError(wanted)) from error
            there = mask.bool()
            there[:, 0] |= ~there.any(dim=1)  # something is attended to, also in an empty caption
            features.append(read.float())
            present.append(there)
        self.features, self.present = torch.cat(features), torch.cat(present)

    def _read(self, captions: Int[Tensor, "B"]) -> tuple[Tensor, Bool[Tensor, "B L"]]:
        read = functional.layer_norm(self.features[captions], self.features.shape[-1:])
        return self.project(read), self.present[captions]


def _settings_of(name: str) -> int:
    """The width of a text encoder."""
    try:
        from transformers import AutoConfig

        settings = AutoConfig.from_pretrained(name)
    except Exception as error:  # as above
        raise _not_there(name, error) from error
    settings = getattr(settings, "text_config", settings)
    width = getattr(settings, "d_model", None) or getattr(settings, "hidden_size", None)
    if not isinstance(width, int):
        raise UserError(f"conditions.text.encoder is {name!r}: this model has no width of its own")
    return width


def _not_there(name: str, error: Exception) -> UserError:
    if isinstance(error, ImportError):
        return UserError(
            "conditions.text.encoder needs transformers: pip install 'selfalign[text]'"
        )
    reason = " ".join(str(error).split())[:LONGEST_REASON]
    return UserError(f"conditions.text.encoder is 'transformers:{name}': {reason}")
