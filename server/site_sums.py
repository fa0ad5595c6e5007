"""Each site's own sums, kept in the run folder, so that sites can join and leave it later."""

import json
from pathlib import Path
from typing import Literal

from fedhead.errors import UserError
from fedhead.files import disk_errors, safe_name, write_atomically
from fedhead.statistics import FeatureStatistics

Part = Literal["train", "held_out"]
"""Which of a site's rows were summed: those it trains on, or those held out that may be summed."""

PRIVATE = 0o600


class SiteSums:
    """A folder of statistics, a file for each site and part, that none but its owner may read.

    Args:
        path: the folder; it is made with the first site.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, site: str, part: Part, stats: FeatureStatistics) -> None:
        """Keep a site's sums.

        Raises:
            UserError: if they may not be written.
            FedheadError: if the disk is full.
        """
        with disk_errors(self.path):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._file(site, part)
        stats.save(path)
        path.chmod(PRIVATE)
        names = self._index()
        if names.get(safe_name(site)) != site:
            write_atomically(self.path / "sites.json", json.dumps({**names, safe_name(site): site}, indent=1))

    def load(self, site: str, part: Part) -> FeatureStatistics | None:
        """Return a site's sums; None if there are none of this part.

        Raises:
            UserError: if the file is damaged.
        """
        path = self._file(site, part)
        return FeatureStatistics.load(path) if path.is_file() else None

    def sites(self) -> list[str]:
        """Return the names of the sites whose sums are kept, in order."""
        return sorted(site for site in self._index().values() if self._file(site, "train").is_file())

    def forget(self, site: str) -> None:
        """Remove a site's sums."""
        for part in ("train", "held_out"):
            self._file(site, part).unlink(missing_ok=True)
        names = self._index()
        names.pop(safe_name(site), None)
        write_atomically(self.path / "sites.json", json.dumps(names, indent=1))

    def _file(self, site: str, part: str) -> Path:
        return self.path / f"{safe_name(site)}.{part}.safetensors"

    def _index(self) -> dict[str, str]:
        try:
            index: dict[str, str] = json.loads((self.path / "sites.json").read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise UserError(f"{self.path / 'sites.json'} is damaged: {error}.") from None
        return index
