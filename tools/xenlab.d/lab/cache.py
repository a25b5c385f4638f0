"""Where everything is kept: one folder, which can be deleted as a whole when no lab is standing."""

import os
import pathlib

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
OWN_FILES = REPOSITORY / "tools" / "xenlab.d"


class Cache:
    """The folders and files of a lab, by name."""

    def __init__(self, folder=None):
        chosen = folder or os.environ.get("PAGECAST_CACHE") or REPOSITORY / "target" / "xenlab"
        self.folder = pathlib.Path(chosen).resolve()
        self.apt = self.folder / "apt"
        self.debian = self.folder / "debian"
        self.images = self.folder / "images"
        self.run = self.folder / "run"
        self.results = self.folder / "results"

    def host(self, name):
        """The folder of a standing host."""
        return self.run / name
