"""Whether a pretrained model is where its name says, found out at once.

Without a network, the loaders of transformers ask the hub again and again, for most of a minute, before they say so.
"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError


def model_problem(name: str) -> str | None:
    """What is wrong with the place of the model `name`; None if it may load."""
    kinds = "`model.name` is a folder with a pretrained model and its tokenizer, or the name of one on the hub"
    if Path(name).exists():
        return None if Path(name, "config.json").is_file() else f"{kinds}; {name} has no config.json in it."
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"{kinds}; there is no folder {name}."
    cached = isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str)
    if cached or huggingface_hub.is_offline_mode():
        return None
    try:
        huggingface_hub.file_exists(name, "config.json")
    except (HfHubHTTPError, HFValidationError):
        return None  # the hub has answered, or would not know the name: the loaders say what is wrong
    except Exception as error:  # of the HTTP library, which is another one from version to version of huggingface_hub
        return (
            f"`model.name` is {name!r}, which is neither a folder here nor a model downloaded before, and the hub "
            f"({huggingface_hub.constants.ENDPOINT}) cannot be reached: {error}. Check the network, or give a folder."
        )
    return None
