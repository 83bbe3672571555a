"""From a picture's name in the data to a file inside the data root, and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

from memfit.errors import UserError
from memfit.inputs.data.draft import RowError
from memfit.inputs.data.formats import file_path


class DataRoot:
    """The one folder that pictures may come from: `data.image_root`, or the folder of the data file.

    Names are relative to it. `..`, absolute names and symbolic links are followed, and refused when they lead outside.
    """

    def __init__(self, root: Path) -> None:
        try:
            self.real = os.path.realpath(root, strict=True)
        except (OSError, ValueError) as error:
            raise UserError(f"data.image_root: no folder {str(root)!r}", "give the folder of the pictures") from error
        if not os.path.isdir(self.real):
            raise UserError(f"data.image_root: {root} is not a folder", "give the folder of the pictures")
        self._inside = self.real.rstrip(os.sep) + os.sep
        self._folders: dict[str, str] = {}  # folder as written -> real folder: one look-up a folder, not one a picture
        self.outside: list[str] = []  # what was refused, so that an error can name a root that would do

    def resolve(self, reference: str) -> Path:
        """The real path of `reference`; whether it exists is not asked here. Raises RowError."""
        name = file_path(reference)
        if "\0" in name:
            raise RowError("missing-image", f"{name!r} holds a NUL byte, which no file name can")
        full = os.path.join(self.real, name)
        folder, last = os.path.split(full)
        if last in ("", ".", ".."):
            real = os.path.realpath(full)
        else:
            if folder not in self._folders:
                self._folders[folder] = os.path.realpath(folder)
            real = os.path.join(self._folders[folder], last)
            if os.path.islink(real):
                real = os.path.realpath(real)
        if not real.startswith(self._inside) and real != self.real:
            self.outside.append(real)
            link = f" (it leads to {real})" if real != os.path.normpath(full) else ""
            raise RowError("outside-root", f"{reference}{link} is outside the data root {self.real}")
        return Path(real)

    def relative(self, path: Path) -> str:
        """A resolved path as it stands below the root."""
        return str(path).removeprefix(self._inside)

    def wider_root(self) -> str | None:
        """The folder that would hold all refused pictures and the present root; None when that is only `/`."""
        if not self.outside:
            return None
        common = os.path.commonpath([os.path.dirname(path) for path in self.outside])
        return None if common == os.sep else common
