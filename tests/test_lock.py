"""requirements.lock has the versions of constraints.txt, each with the hashes of its files."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_tested_version_is_locked_with_hashes() -> None:
    pinned = re.findall(r"^([\w.-]+==\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    locked: dict[str, list[str]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if found := re.fullmatch(r"([\w.-]+==\S+) \\", line):
            hashes = locked.setdefault(found[1], [])
        else:
            hashes.append(*re.findall(r"^    --hash=sha256:([0-9a-f]{64})", line))

    def normal(names: object) -> list[str]:
        return sorted(str(name).lower().replace("_", "-") for name in names)  # type: ignore[attr-defined]

    assert normal(pinned) == normal(locked)
    assert all(locked.values())
