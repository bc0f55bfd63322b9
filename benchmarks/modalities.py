"""Small real data of other kinds than images of classes, as files for `--data.name arrays`.

    python benchmarks/modalities.py power aeon-*.whl power.npz        # signals, 2 classes
    python benchmarks/modalities.py vowels aeon-*.whl vowels.npz      # signals of unequal lengths, 9 classes
    python benchmarks/modalities.py digits - digits_video.npz         # videos of 16 frames, 10 classes
    python benchmarks/modalities.py emoji emoji-datasource-google-*.tgz emoji.npz   # images with names

The first two are in the package aeon (`pip download aeon --no-deps`), the digits in scikit-learn, the emoji
in the npm package emoji-datasource-google (`npm pack emoji-datasource-google`; its data is under the MIT
licence, Noto's images under Apache 2.0). None is part of this project.
"""

import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]
VOWEL_LENGTH = 32
"""The longest utterance has 29 frames; the others are filled up, and their lengths told."""
CANVAS, FRAMES = 16, 16
EMOJI_SIDE = 32


def read_ts(text: str) -> tuple[list[np.ndarray], list[str]]:
    """Series (channels, length) and labels of a file of the format .ts."""
    lines = text.partition("@data")[2].strip().splitlines()
    series, labels = [], []
    for line in lines:
        *channels, label = line.split(":")
        series.append(np.array([[float(x) for x in c.split(",")] for c in channels]))
        labels.append(label.strip())
    return series, labels


def of_aeon(wheel: str, name: str) -> tuple[list[np.ndarray], list[str]]:
    """Both halves of a data set in aeon's wheel."""
    series: list[np.ndarray] = []
    labels: list[str] = []
    with zipfile.ZipFile(wheel) as archive:
        for half in ("TRAIN", "TEST"):
            text = archive.read(f"aeon/datasets/data/{name}/{name}_{half}.ts").decode()
            found = read_ts(text)
            series += found[0]
            labels += found[1]
    return series, labels


def power(source: str) -> Arrays:
    """ItalyPowerDemand: a day's demand by the hour, in winter (1) or summer (2)."""
    series, labels = of_aeon(source, "ItalyPowerDemand")
    seasons = {"1": "winter", "2": "summer"}
    return {
        "signals": np.stack(series).astype(np.float32),
        "labels": np.array([seasons[label] for label in labels]),
    }


def vowels(source: str) -> Arrays:
    """JapaneseVowels: 12 cepstral coefficients of /ae/, spoken by nine people."""
    series, labels = of_aeon(source, "JapaneseVowels")
    signals = np.zeros((len(series), 12, VOWEL_LENGTH), np.float32)
    for row, one in zip(signals, series, strict=True):
        row[:, : one.shape[1]] = one
    lengths = np.array([one.shape[1] for one in series])
    return {"signals": signals, "labels": np.array(labels), "lengths": lengths}


def digits(source: str) -> Arrays:
    """Handwritten digits that move across a canvas, and come back from its border."""
    from sklearn.datasets import load_digits

    data = load_digits()
    generator = np.random.default_rng(0)
    videos = np.zeros((len(data.images), 1, FRAMES, CANVAS, CANVAS), np.uint8)
    for video, image in zip(videos, data.images, strict=True):
        place = generator.uniform(0, CANVAS - 8, 2)
        speed = generator.uniform(0.6, 1.4, 2) * generator.choice([-1, 1], 2)
        for frame in video[0]:
            row, column = np.round(place).astype(int)
            frame[row : row + 8, column : column + 8] = np.round(image * 255 / 16)
            place = place + speed
            beyond = (place < 0) | (place > CANVAS - 8)
            speed[beyond] *= -1
            place = np.clip(place, 0, CANVAS - 8)
    return {"videos": videos, "labels": data.target}


def emoji(source: str) -> Arrays:
    """Emoji on white, each with its name in small letters; variants of skin are left out."""
    from PIL import Image

    images, captions, categories = [], [], []
    with tarfile.open(source) as archive:
        held = archive.extractfile("package/emoji.json")
        assert held is not None
        for entry in json.load(held):
            if not entry["has_img_google"]:
                continue
            file = archive.extractfile(f"package/img/google/64/{entry['image']}")
            assert file is not None
            picture = Image.open(io.BytesIO(file.read())).convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            flat = Image.alpha_composite(white, picture).convert("RGB")
            images.append(np.asarray(flat.resize((EMOJI_SIDE, EMOJI_SIDE), Image.Resampling.BOX)))
            captions.append(entry["name"].lower())
            categories.append(entry["category"])
    return {
        "images": np.stack(images).transpose(0, 3, 1, 2),
        "captions": np.array(captions),
        "labels": np.array(categories),
    }


SETS = {"power": power, "vowels": vowels, "digits": digits, "emoji": emoji}


def main() -> None:
    """Write one of them."""
    if len(sys.argv) != 4 or sys.argv[1] not in SETS:
        sys.exit(__doc__)
    arrays = SETS[sys.argv[1]](sys.argv[2])
    np.savez(Path(sys.argv[3]), **arrays)
    print({name: (array.shape, array.dtype.str) for name, array in arrays.items()})


if __name__ == "__main__":
    main()
