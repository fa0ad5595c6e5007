"""The caches of torchvision and the hub on this machine, and downloads into them."""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse

import torch.hub

from fedhead.errors import FedheadError


def torch_file(url: str) -> Path:
    """Return torch's cache path for a download from `url`."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name


def fetch_torch_file(url: str, spec: str) -> Path:
    """Return torch's own copy of a file, downloaded if missing and compared with the digest in its name.

    Raises:
        FedheadError: with all alternatives, if it cannot be downloaded.
    """
    path = torch_file(url)
    if path.is_file():
        return path
    digest = torch.hub.HASH_REGEX.search(path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digest.group(1) if digest else None, progress=False)
    except (OSError, RuntimeError) as error:
        raise not_to_be_had(spec, url, str(path), error) from error
    return path


def hub_file(repository: str, names: Sequence[str]) -> Path | None:
    """Return the first of a repository's files in the hub's cache on this machine; None if there is none."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = repository.partition("@")
    for name in names:
        found = try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def fetch_hub_file(repository: str, names: Sequence[str], spec: str) -> Path:
    """Return the first existing file of a repository: from the hub's cache, or else from the hub.

    Args:
        repository: `owner/name`, optionally with `@revision`.
        names: the file names in order of preference.
        spec: the spec of the backbone, for messages.

    Raises:
        FedheadError: with all alternatives, if it cannot be downloaded.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    if found := hub_file(repository, names):
        return found
    owner_name, _, revision = repository.partition("@")
    missing: Exception = FileNotFoundError(f"it has none of {', '.join(names)}")
    for name in names:
        try:
            # Fails at once without a network; the download would retry for almost a minute.
            get_hf_file_metadata(hf_hub_url(owner_name, name, revision=revision or None))
            return Path(hf_hub_download(owner_name, name, revision=revision or None))
        except EntryNotFoundError as error:
            missing = error
        # Without a network, each layer below raises its own errors.
        except Exception as error:
            missing = error
            break
    url = f"https://huggingface.co/{owner_name}"
    raise not_to_be_had(spec, url, f"the hub's cache {constants.HF_HUB_CACHE}", missing) from missing


def not_to_be_had(spec: str, url: str, place: str, error: Exception) -> FedheadError:
    """Return an error with the searched places and the alternatives for obtaining weights."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return FedheadError(
        f"The weights of {spec} are not on this machine and could not be downloaded from {url} ({reason}). There are "
        f"three ways: pass a file with --weights FILE (with a network, 'fedhead backbones fetch {spec} --out "
        f"FILE' writes it); copy the download to {place}; or join a run, since its coordinator sends the weights."
    )
