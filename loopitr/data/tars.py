"""Checks that tar files are complete: readers stop silently at a damaged header or a missing end."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

BLOCK = tarfile.BLOCKSIZE
PADDING = 2**20  # the number of bytes after the end that are checked to be zeros
CUT = "tar file without its end, samples may be missing"
BROKEN = "tar file broken in its middle, the samples after that are missing"
SPARSE = tarfile.GNUTYPE_SPARSE  # The length of a sparse member does not say where the next header is.


def tar_fault(path: str | Path) -> str | None:
    """The fault of a local tar file in a few words; None: it is complete, compressed or not a tar file.

    Only the header of each member is read.

    Example:
        >>> import io, tarfile, tempfile
        >>> from pathlib import Path
        >>> from loopitr.data.tars import tar_fault
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with tarfile.open(f"{folder}/x.tar", "w") as tar:
        ...         tar.addfile(tarfile.TarInfo("empty.txt"))
        ...     content = Path(folder, "x.tar").read_bytes()
        ...     _ = Path(folder, "cut.tar").write_bytes(content[:512])
        ...     tar_fault(f"{folder}/x.tar"), tar_fault(f"{folder}/cut.tar")
        (None, 'tar file without its end, samples may be missing')
    """
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        if not _is_header(file.read(BLOCK)):
            return None  # If it is not a tar file, its reader raises an error.
        size = file.seek(0, os.SEEK_END)
        place = 0
        while place + BLOCK <= size:
            file.seek(place)
            header = file.read(BLOCK)
            if not header.strip(b"\0"):
                return BROKEN if file.read(PADDING).strip(b"\0") else None
            length = _length(header)
            if not _is_header(header) or length < 0:
                return BROKEN
            if header[156:157] == SPARSE:
                return None
            place += BLOCK + -(-length // BLOCK) * BLOCK
        return CUT


def _is_header(block: bytes) -> bool:
    """Whether the checksum of a header is right; its own eight bytes count as spaces in it."""
    if len(block) < BLOCK or not block.strip(b"\0"):
        return False
    try:
        checksum = int(block[148:156].strip(b" \0") or b"x", 8)
    except ValueError:
        return False
    return checksum == sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _length(header: bytes) -> int:
    """The length of the member after a header, in octal digits or, if it is large, binary; below 0: not a number."""
    field = header[124:136]
    if field[0] in (0o200, 0o377):
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1
