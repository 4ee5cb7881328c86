"""The hub from which timm and transformers download: whether it answers, and errors in one line."""

from pathlib import Path


def local_only(name: str) -> bool:
    """Whether a name must be looked for on this machine alone: it is a folder, or nothing can be downloaded."""
    return Path(name).is_dir() or not hub_answers()


def hub_answers() -> bool:
    """Whether models can be downloaded: asked once and shortly, where the libraries would try for a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # no network, no proxy, no answer: of several libraries
        return False
    return True


def first_line(error: Exception) -> str:
    """The message of an error up to its first line break, or its kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
