"""Whether tar files are whole: what reads them ends without a word where a header is broken or the rest is missing."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

BLOCK = tarfile.BLOCKSIZE
PADDING = 2**20  # bytes of zeros that may follow the end, of which any number is usual
CUT = "tar file without its end, samples may be missing"
BROKEN = "tar file broken in its middle, the samples after that are missing"
SPARSE = tarfile.GNUTYPE_SPARSE  # Its length does not say where the next header is.


def tar_fault(path: str | Path) -> str | None:
    """What is wrong with a local tar file, in a few words, or None. Of each member 512 bytes are read.

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
            return None  # It is compressed, or no tar file at all, which whoever reads it says.
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
    """Whether its checksum, in eight of its bytes that count as spaces, is right."""
    if len(block) < BLOCK or not block.strip(b"\0"):
        return False
    try:
        checksum = int(block[148:156].strip(b" \0") or b"x", 8)
    except ValueError:
        return False
    return checksum == sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _length(header: bytes) -> int:
    """The bytes that follow a header: octal digits, or a binary number where they are too many for those; below 0 for
    neither."""
    field = header[124:136]
    if field[0] in (0o200, 0o377):
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1
