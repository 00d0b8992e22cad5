"""JSON files as annotation tools and Windows write them: UTF-8 with or without BOM, UTF-16, UTF-32, gzip."""

from __future__ import annotations

import json
import stat
import zlib
from pathlib import Path
from typing import Any

from carsam.errors import DataError

# instances_train2017.json has 0.45 GB; a packed file that grows beyond this is not read on.
MAX_BYTES = 4 * 2**30

_GZIP = b"\x1f\x8b"
# First bytes of what is given by mistake in place of a JSON file, and the fix.
_OTHER_FORMATS = {
    b"PK\x03\x04": "is a zip archive; unpack it and give the JSON file inside",
    b"BZh": "is packed with bzip2; unpack it (bunzip2) and give the JSON file",
    b"\xfd7zXZ": "is packed with xz; unpack it (unxz) and give the JSON file",
    b"\x28\xb5\x2f\xfd": "is packed with zstd; unpack it (unzstd) and give the JSON file",
    b"version https://git-lfs": "is a git-lfs pointer, not the file itself; run `git lfs pull`",
    b"\x89PNG": "is an image; give the annotation file",
    b"\xff\xd8\xff": "is an image; give the annotation file",
    b"<": "is XML or a web page; give a COCO JSON file (Pascal VOC has to be converted)",
}


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Args:
        path: The file, plain or gzip, in UTF-8, UTF-16 or UTF-32, with or without byte order mark.

    Raises:
        DataError: The file is missing, unreadable, larger than 4 GiB, in another encoding or format, or is no JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError(f"{path} is not valid JSON for carsam: it is nested too deeply.") from None
    except ValueError as error:
        # Also Python's refusal of numbers with thousands of digits.
        raise DataError(f"{path} is not valid JSON ({error}); {_hint(error)}") from error


def read_text(path: str | Path) -> str:
    """Reads the text of a JSON file.

    Raises:
        DataError: As :func:`read_json`, but for text that is no JSON.
    """
    path = Path(path)
    data = _read_bytes(path)
    if data.startswith(_GZIP):
        data = _unpacked(data, path)
    for start, what in _OTHER_FORMATS.items():
        if data.startswith(start):
            raise DataError(f"{path} {what}.")
    if not data.strip(b" \t\r\n\0"):
        raise DataError(f"{path} is empty.")
    return _decoded(data, path)


def _hint(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
        return "a file of JSON lines has to be made one JSON value first."
    return "is the file complete?"


def _read_bytes(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise DataError(f"{path} is a folder; give the COCO JSON file itself.")
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise DataError(f"{path} is a device; give a COCO JSON file.")
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} is larger than {MAX_BYTES / 2**30:.0f} GiB; split it into smaller files.")
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"there is no file {path}.") from None
    except (OSError, MemoryError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {path}: {error or type(error).__name__}.") from error


def _unpacked(data: bytes, path: Path) -> bytes:
    content = b""
    # Several gzip files one after the other are a gzip file.
    while data.startswith(_GZIP):
        unpacker = zlib.decompressobj(wbits=31)
        try:
            content += unpacker.decompress(data, MAX_BYTES - len(content))
        except (zlib.error, MemoryError) as error:
            raise DataError(f"{path} is a damaged gzip file ({error}); copy or download it again.") from error
        if unpacker.unconsumed_tail or len(content) >= MAX_BYTES:
            raise DataError(f"{path} unpacks to more than {MAX_BYTES / 2**30:.0f} GiB; split it into smaller files.")
        if not unpacker.eof:
            raise DataError(f"{path} is a gzip file that was cut off; copy or download it again.")
        data = unpacker.unused_data
    return content


def _decoded(data: bytes, path: Path) -> str:
    try:
        return data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        where = f"{path} is not UTF-8 text (byte {error.start})"
    try:
        data.decode("gb18030")
    except UnicodeDecodeError:
        raise DataError(f"{where}; save it as UTF-8, or copy it again if it is damaged.") from None
    raise DataError(
        f"{where}; it may be GBK, as Chinese Windows writes it: `iconv -f GBK -t UTF-8 {path.name} > utf8.json`."
    )
