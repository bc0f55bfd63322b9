"""Read everything that is stored, and compare it with the manifest."""

from pathlib import Path

from selfalign.data.latents.autoencoder import stored_weights_sha256
from selfalign.data.latents.store import (
    AUTOENCODER,
    INDEX,
    Progress,
    check_sizes,
    file_sha256,
    read_manifest,
)
from selfalign.errors import UserError
from selfalign.names import printable


def verify(root: Path, progress: Progress = lambda done, total: None) -> dict[str, str]:
    """What is wrong with a stored set, by file; empty for an intact one.

    Args:
        root: a finished set.
        progress: called with bytes read and bytes in all.

    Raises:
        UserError: there is no readable manifest.
    """
    manifest = read_manifest(root)
    problems = check_sizes(root, manifest)
    checksums = {INDEX: manifest.index_sha256}
    checksums |= {shard.file: shard.sha256 for shard in manifest.shards}
    total = manifest.records * manifest.layout.record_bytes
    done = 0
    for file, expected in checksums.items():
        if file in problems:
            continue
        try:
            if file_sha256(root / file) != expected:
                problems[file] = "is damaged: its checksum differs from the manifest's"
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
