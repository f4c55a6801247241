"""The model hub: what of it is on this machine or can be fetched, without a minute's wait where there is no network."""

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foveal.train.errors import RunError

FILES = ("config.json", "preprocessor_config.json")
SAFE = ("model.safetensors", "model.safetensors.index.json", "model-0*.safetensors")
OLD = ("pytorch_model.bin",)  # fetched where there is nothing else


def transformers_folder(name: str) -> Path:
    """The folder of a transformers model: `name` itself where it is one, else the hub's, fetched if it is not cached.

    Raises RunError where it can neither be found nor fetched.
    """
    own = Path(name).expanduser()
    if own.is_dir():
        return own
    from huggingface_hub import snapshot_download

    try:
        with patience():
            folder = Path(snapshot_download(name, allow_patterns=[*FILES, *SAFE]))
            if not any(folder.glob("model*.safetensors")):
                folder = Path(snapshot_download(name, allow_patterns=[*FILES, *OLD]))
    except (OSError, ValueError) as error:  # not cached and offline, not there, gated, not a name
        raise RunError(
            f"the transformers model {name} is neither a folder, nor on this machine, nor can it be downloaded"
            f" ({type(error).__name__}): download it where there is a network, or give a folder with its config.json"
            " and model.safetensors"
        ) from None
    return folder


@contextmanager
def patience() -> Iterator[None]:
    """Offline, the hub's client asks for most of a minute before it looks at its cache: spare the user that."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = offline or not _reachable(constants.ENDPOINT)
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _reachable(address: str) -> bool:
    if urllib.request.getproxies():
        return True  # a proxy resolves names for us
    try:
        socket.getaddrinfo(address.partition("//")[2].partition("/")[0].partition(":")[0], 443)
    except OSError:
        return False
    return True
