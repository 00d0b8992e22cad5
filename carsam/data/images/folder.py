"""Where the images of an annotation file lie, also where their names are spelled in another way."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

from carsam.data.coco.annotations import CocoImage, Id
from carsam.errors import DataError

# Files that are looked through for a name that is not there as it is spelled.
MAX_FILES = 300_000


class ImageFolder:
    """A folder of images.

    A name is looked up as it is spelled first. Only if there is no such file, the same name is accepted with another
    separator, case, Unicode form or percent coding, with fewer or other folders before it; never if several files fit.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises DataError if there is no such folder."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            what = f"{folder} is a file; give the folder" if os.path.isfile(self.folder) else None
            raise DataError(f"{what} that holds the images." if what else f"there is no image folder {folder}.")

    def exact(self, name: str) -> Path | None:
        """The file of exactly this name."""
        path = self.folder / name
        # os.path answers False where pathlib raises: names that are too long.
        return path if os.path.isfile(path) else None

    def similar(self, name: str) -> Path | None:
        """The only file whose name can be meant."""
        parts = name_parts(name)
        for start in range(len(parts)):
            found = self._by_path.get("/".join(parts[start:]), ())
            if len(found) == 1:
                return self.folder / found[0]
            if found:
                return None
        found = self._by_name.get(parts[-1], ()) if parts else ()
        return self.folder / found[0] if len(found) == 1 else None

    def reason(self, name: str) -> str:
        """Why a name was not found, as far as the folder tells; empty where it does not."""
        parts = name_parts(name)
        found = self._by_name.get(parts[-1], ()) if parts else ()
        if len(found) > 1:
            return f"several files fit: {found[0]}, {found[1]}"
        stem = parts[-1].rpartition(".")[0] if parts else ""
        others = self._by_stem.get(stem, ()) if stem else ()
        return f"there is {others[0]}, with another suffix" if others else ""

    @cached_property
    def _files(self) -> list[str]:
        files: list[str] = []
        for base, folders, names in os.walk(self.folder):
            folders.sort()
            relative = os.path.relpath(base, self.folder)
            files += [name if relative == "." else os.path.join(relative, name) for name in sorted(names)]
            if len(files) > MAX_FILES:
                break
        return files

    @cached_property
    def _by_path(self) -> dict[str, list[str]]:
        return _index(self._files, lambda parts: "/".join(parts))

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        return _index(self._files, lambda parts: parts[-1])

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        return _index(self._files, lambda parts: parts[-1].rpartition(".")[0])


def _index(files: list[str], key: Callable[[list[str]], str]) -> dict[str, list[str]]:
    index: dict[str, list[str]] = defaultdict(list)
    for file in files:
        parts = name_parts(file)
        if parts:
            index[key(parts)].append(file)
    return index


def name_parts(name: str) -> list[str]:
    """A path's parts in one spelling: without drive and dots, in lower case, composed, percent codes resolved."""
    plain = unicodedata.normalize("NFC", unquote(name).replace("\\", "/")).casefold()
    return [part for part in plain.split("/") if part not in ("", ".", "..") and not part.endswith(":")]


def locate(
    images: Sequence[CocoImage], folder: ImageFolder, source: Path, *, some_missing: bool = False
) -> tuple[dict[Id, Path], list[CocoImage]]:
    """Finds the files of images.

    Args:
        images: What to find.
        folder: Where.
        source: The annotation file, for messages.
        some_missing: Accept that some images are not there, as long as one is.

    Returns:
        Paths by image id, and the images that were found under another spelling of their name.

    Raises:
        DataError: Images are not there; says how many, the first, and why where the folder tells.
    """
    found: dict[Id, Path] = {}
    other: dict[Path, list[CocoImage]] = defaultdict(list)
    missing = []
    for image in images:
        path = folder.exact(image.file_name)
        if path is None:
            missing.append(image)
        else:
            found[image.id] = path
    taken = set(found.values())
    for image in missing:
        path = folder.similar(image.file_name)
        if path is not None and path not in taken:
            other[path].append(image)
    # Two names that lead to one file were two files where the annotations were made.
    respelled = [group[0] for group in other.values() if len(group) == 1]
    found |= {group[0].id: path for path, group in other.items() if len(group) == 1}
    lost = [image for image in missing if image.id not in found]
    if lost and (not some_missing or len(lost) == len(images)):
        reason = folder.reason(lost[0].file_name)
        raise DataError(
            f"{len(lost)} of the {len(images)} images that {source} names are not in {folder.folder} "
            f"(first: {lost[0].file_name}{'; ' + reason if reason else ''}); "
            "give the folder that the file names are relative to."
        )
    return found, respelled
