"""A secret that a file holds, so that it is in no configuration, command line or environment."""

from pathlib import Path

from headrace.serving.errors import ConfigRefused

SECRET_BYTES_MAX = 4096


def read_secret(path: Path, *, key: str) -> str:
    """The one line of a file that holds a secret; `key` is the setting that names the file.

    Raises:
        ConfigRefused: it cannot be read, or is empty.
    """
    try:
        with path.open("rb") as file:
            text = file.read(SECRET_BYTES_MAX).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigRefused(
            f"The file {path} cannot be read: {type(error).__name__}.",
            why=f"{key} names it.",
            fix="Make it readable for this user, or correct its path.",
            field=key,
        ) from error
    if not text:
        raise ConfigRefused(
            f"The file {path} is empty.",
            why=f"{key} names it, and what it should hold is not there.",
            fix="Write the secret into it, on one line.",
            field=key,
        )
    return text
