"""Files of the Hugging Face hub, which huggingface_hub fetches and keeps."""

from pathlib import Path

from selfalign.errors import UserError

PREFIX = "hub:"
ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


def fetch(name: str) -> Path:
    """The local copy of `hub:OWNER/NAME[:FILE]`; a name without that prefix is a path already.

    Raises:
        UserError: there is no such repository or file, or it has to be
            said which.
    """
    if not name.startswith(PREFIX):
        return Path(name)
    repository, _, file = name.removeprefix(PREFIX).partition(":")
    if repository.count("/") != 1:
        raise UserError(f"{name!r}: allowed is {PREFIX}OWNER/NAME, or {PREFIX}OWNER/NAME:FILE")
    import huggingface_hub

    try:
        if not file:
            files = [f for f in huggingface_hub.list_repo_files(repository) if f.endswith(ENDINGS)]
            if len(files) != 1:
                raise UserError(
                    f"{name} holds {', '.join(sorted(files)) or 'no weights'}: say which, as in "
                    f"{PREFIX}{repository}:FILE"
                )
            (file,) = files
        return Path(huggingface_hub.hf_hub_download(repository, file))
    except UserError:
        raise
    except Exception as error:  # the network, the hub, and what people may not see
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{name} cannot be fetched: {reason or type(error).__name__}") from error
