"""Where torchvision and the hub keep weights on this machine, and getting what is not there yet."""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse

import torch.hub

from fedhead.errors import FedheadError


def torch_file(url: str) -> Path:
    """Return where torch keeps what it downloads from `url`."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name


def fetch_torch_file(url: str, spec: str) -> Path:
    """Return torch's own copy of a file, downloaded and compared with the digest in its name if it is not there.

    Raises:
        FedheadError: with all the ways to get it, if it cannot be downloaded.
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
    """Return the first of a repository's files that is in the hub's cache on this machine; None for none."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = repository.partition("@")
    for name in names:
        found = try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def fetch_hub_file(repository: str, names: Sequence[str], spec: str) -> Path:
    """Return the first of a repository's files that there is: from the hub's cache, or else from the hub.

    Args:
        repository: `owner/name`, perhaps with `@revision`.
        names: in the order of preference.
        spec: of the backbone, for messages.

    Raises:
        FedheadError: with all the ways to get it, if it cannot be downloaded.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    if found := hub_file(repository, names):
        return found
    owner_name, _, revision = repository.partition("@")
    missing: Exception = FileNotFoundError(f"it has none of {', '.join(names)}")
    for name in names:
        try:
            # Unlike the download, which without a network tries for most of a minute.
            get_hf_file_metadata(hf_hub_url(owner_name, name, revision=revision or None))
            return Path(hf_hub_download(owner_name, name, revision=revision or None))
        except EntryNotFoundError as error:
            missing = error
        # Without a network, each layer below raises errors of its own.
        except Exception as error:
            missing = error
            break
    url = f"https://huggingface.co/{owner_name}"
    raise not_to_be_had(spec, url, f"the hub's cache {constants.HF_HUB_CACHE}", missing) from missing


def not_to_be_had(spec: str, url: str, place: str, error: Exception) -> FedheadError:
    """Return the failure that says where weights were looked for and the ways to bring them."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return FedheadError(
        f"The weights of {spec} are not on this machine and could not be downloaded from {url} ({reason}). There are "
        f"three ways: name a file with --weights FILE (where there is a network, 'fedhead backbones fetch {spec} --out "
        f"FILE' writes it); bring the download to {place}; or take part in a run, whose coordinator sends the weights."
    )
