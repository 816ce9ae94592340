"""Whether a pretrained model or a data set is where its name says, found out at once.

Without a network, the loaders of transformers and datasets ask the hub again and again, for most of a minute, before they
say so.
"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from slicefine.errors import did_you_mean


def model_problem(name: str) -> str | None:
    """What is wrong with the place of the model `name`; None if it may load."""
    kinds = "`model.name` is a folder with a pretrained model and its tokenizer, or the name of one on the hub"
    if Path(name).exists():
        return None if Path(name, "config.json").is_file() else f"{kinds}; {name} has no config.json in it."
    if _is_path(name):
        return f"{kinds}; there is no folder {name}.{near(name)}"
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
            f"({huggingface_hub.constants.ENDPOINT}) cannot be reached: {error}. Check the network, or give a folder.{near(name)}"
        )
    return None


def dataset_problem(name: str) -> str | None:
    """What is wrong with the place of the data set `name`, which is no file or folder here; None if the hub may have it."""
    parts = Path(name).parts
    if _is_path(name) or (len(parts) == 2 and Path(parts[0]).is_dir()):  # a folder of splits, say, and a slip in one
        return f"There is no file or folder {name}.{near(name)}"
    if huggingface_hub.is_offline_mode() or _is_cached(name):
        return None
    try:
        there = huggingface_hub.repo_exists(name, repo_type="dataset")
    except HFValidationError:
        there = False
    except HfHubHTTPError:
        return None  # the hub has answered: the loaders say what is wrong
    except Exception as error:  # of the HTTP library, as above
        return (
            f"There is no file or folder {name} here.{near(name)} For a data set of that name, the hub "
            f"({huggingface_hub.constants.ENDPOINT}) cannot be reached: {error}. Check the network, or give a file or folder."
        )
    return None if there else f"{name!r} is no file or folder here, and no data set of the hub.{near(name)}"


def _is_path(name: str) -> bool:
    """Whether `name` can be a path alone: names on the hub are `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def near(name: str) -> str:
    """`" Did you mean ...?"` with the nearest of the names beside the path `name`."""
    path = Path(name)
    beside = [str(path.with_name(other.name)) for other in path.parent.glob("*")] if path.parent.is_dir() else []
    return did_you_mean(str(path), beside)


def _is_cached(name: str) -> bool:
    """Whether `datasets` has the data set of an earlier time."""
    from datasets.config import HF_DATASETS_CACHE
    from datasets.naming import camelcase_to_snakecase

    owner, _, last = name.rpartition("/")
    folder = "___".join([*filter(None, [owner]), camelcase_to_snakecase(last)])
    return Path(HF_DATASETS_CACHE).expanduser().joinpath(folder).is_dir()
