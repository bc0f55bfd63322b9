"""Read everything that is stored, and compare it with the manifest."""

import hashlib
from pathlib import Path

import numpy as np
import xxhash

from selfalign.data.latents.autoencoder import stored_weights_sha256
from selfalign.data.latents.store import (
    AUTOENCODER,
    FEATURES,
    INDEX,
    MANIFEST,
    Progress,
    check_sizes,
    read_manifest,
)
from selfalign.errors import UserError
from selfalign.names import printable


def verify(root: Path, progress: Progress = lambda done, total: None) -> dict[str, str]:
    """What is wrong with a stored set and the features beside it, by file; empty for intact ones.

    Each shard is read once, for its own checksum and those of its records.

    Args:
        root: a finished set.
        progress: called with bytes read and bytes in all.

    Raises:
        UserError: there is no readable manifest.
    """
    problems: dict[str, str] = {}
    for folder in (root, *sorted(path.parent for path in root.glob(f"{FEATURES}/*/{MANIFEST}"))):
        place = "" if folder == root else f"{folder.relative_to(root)}/"
        found = _verify(folder, progress)
        problems |= {f"{place}{file}": problem for file, problem in found.items()}
    return problems


def _verify(root: Path, progress: Progress) -> dict[str, str]:
    """What is wrong with the images of a set, or with the features that an encoder made of them."""
    manifest = read_manifest(root)
    layout, has_checksums = manifest.layout, manifest.has_checksums
    problems = check_sizes(root, layout, manifest.shards, has_checksums)
    files = [] if layout.kind == "features" else [(INDEX, manifest.index_sha256, "")]
    for shard in manifest.shards:
        intact = has_checksums and shard.checksums not in problems
        files.append((shard.file, shard.sha256, shard.checksums if intact else ""))
    total, done = manifest.records * layout.record_bytes, 0
    for file, sha256, checksums in files:
        if file in problems:
            continue
        try:
            found, found_checksums = _hash(root / file, layout.record_bytes // layout.shape[0])
            if found != sha256:
                problems[file] = "is damaged: its checksum differs from the manifest's"
            elif checksums and np.fromfile(root / checksums, "<u8").tolist() != found_checksums:
                problems[checksums] = f"is damaged: {file} is intact and has other checksums"
            done += (root / file).stat().st_size
        except OSError as error:
            problems[file] = f"cannot be read: {printable(error.strerror or str(error))}"
        progress(min(done, total), total)
    if manifest.layout.autoencoder_sha256:
        try:
            actual = stored_weights_sha256(root / AUTOENCODER)
            if actual != manifest.layout.autoencoder_sha256:
                problems[AUTOENCODER] = "is damaged: its weights differ from the manifest's"
        except UserError as error:
            problems[AUTOENCODER] = str(error)
    return problems


def _hash(path: Path, view_bytes: int) -> tuple[str, list[int]]:
    """SHA-256 of a file, and the checksum of each view in it."""
    digest, checksums = hashlib.sha256(), []
    with path.open("rb") as file:
        while view := file.read(view_bytes):
            digest.update(view)
            checksums.append(xxhash.xxh3_64_intdigest(view))
    return digest.hexdigest(), checksums
