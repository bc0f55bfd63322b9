"""A full disk is one line, whatever is being written, and nothing half-written stays."""

import shutil
from pathlib import Path

import pytest
import torch
from small_images import random_image
from small_weights import network

from selfalign.cli import main

WRITERS = {
    "train": "train sit --out DISK/out --data.name digits --model.size tiny/4 --training.steps 2",
    "sample": "sample RUN --out DISK/out --num 40 --steps 1",
    "prepare": "prepare IMAGES DISK/out --image-size 32 --vae none",
    "inspect": "inspect RUN --only labels --out DISK/out",
    "report": "report RUN --out DISK/out.html",
    "import": "import FILE DISK/out --from sra --heads 2",
    "export": "export RUN DISK/out --format safetensors",
    "export diffusers": "export RUN DISK/out --format diffusers",
    "settings": "train sit --write-config DISK/out.yaml",
    "study": "study 2x2 --out DISK/out --profile smoke --data.name digits",
}
"""What each command is called with."""


SLOW = ("inspect", "study", "export", "export diffusers", "settings")
"""Which are called once; the others also where a first file still fits, or a second one."""


@pytest.mark.parametrize(
    ("writer", "left"),
    [
        (writer, left)
        for writer in WRITERS
        for left in (0, 4096, 12_288)
        if writer not in SLOW or not left
    ],
)
def test_is_one_line_wherever_something_is_written(
    small_disk: Path,
    small_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    writer: str,
    left: int,
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        random_image(number).save(images / f"{number}.png")
    (small_disk / "fill").write_bytes(bytes(shutil.disk_usage(small_disk).free - left))
    file = tmp_path / "weights.pt"
    torch.save({"ema": network().state_dict()}, file)
    places = {"DISK": small_disk, "RUN": small_run, "IMAGES": images, "FILE": file}
    words = WRITERS[writer]
    for name, place in places.items():
        words = words.replace(name, str(place))
    code = main(words.split())
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith("selfalign: error: ") and said.count("\n") == 1, said
    assert "No space left" in said or "are free" in said
    assert not [path for path in small_disk.rglob("*") if ".partial" in path.name]
    if writer in ("train", "prepare", "import"):
        assert [path.name for path in small_disk.iterdir()] == ["fill"]
