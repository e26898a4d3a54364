"""The two things that a download gives instead of a file."""

from __future__ import annotations

from pathlib import Path


def refuse_downloads(file: Path, head: bytes, expected: str) -> None:
    """ValueError if `head`, the first bytes of `file`, begin a web page or a Git LFS pointer."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(
            f"{file}: is an HTML page, expected {expected}; the link led to a web page that shows the file, "
            "download the raw file instead"
        )
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file}: is a Git LFS pointer, expected {expected}; run `git lfs pull` where it came from")
