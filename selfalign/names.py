"""Names of files and classes, which may hold anything, as bytes and as text for people."""


def encode_name(name: str) -> bytes:
    """A file's name as bytes, whether or not it is valid UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def printable(text: str) -> str:
    """A name or a message as one line that any terminal can show.

    Runs of white space become one space; what has no shape of its own (control characters, bytes that
    are no UTF-8, changes of the writing direction) is written as a backslash and its number.
    """
    shown = (
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in " ".join(text.split())
    )
    return "".join(shown)
