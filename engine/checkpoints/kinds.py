"""What a file is that is no checkpoint, told by its first bytes."""

from __future__ import annotations

import re

_UNPACK = "unpack it and give the file inside"
_STARTS = [  # offset, bytes, what it is, what to do
    (0, b"version https://git-lfs", "a Git LFS pointer", "fetch the file that it stands for with `git lfs pull`"),
    (0, b"\x1f\x8b", "compressed with gzip", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
    (257, b"ustar", "a tar archive", "unpack it, or load and save it anew with the torch that wrote it"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, of Keras for example", "save the weights with torch.save"),
    (0, b"\x93NUMPY", "an array of numpy", "save a state_dict with torch.save"),
    (0, b"\x89PNG", "a picture (PNG)", "give a .pth file"),
    (0, b"\xff\xd8\xff", "a picture (JPEG)", "give a .pth file"),
]


def other_kind(content: bytes) -> str | None:
    """ "is a web page, not a checkpoint; ..." where the first bytes can be no checkpoint's, else None."""
    for offset, start, kind, advice in _STARTS:
        if content.startswith(start, offset):
            return f"is {kind}, not a checkpoint; {advice}"
    begin = content[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if begin.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "is a web page, not a checkpoint; download the raw file"
    if re.match(rb"\x08[\x03-\x1f][\x12\x1a\x22\x3a\x42\x72]", content):  # the fields of a model, its version first
        return "is an ONNX file, not a checkpoint; load_binarized_example.py scores it if its name ends in .onnx"
    if content[8:10] == b'{"' and 2 <= int.from_bytes(content[:8], "little") <= len(content):
        return "is a safetensors file, not a checkpoint; save what safetensors.torch.load_file gives with torch.save"
    return None


def is_text(content: bytes) -> bool:
    """Whether a file that cannot be read as a checkpoint is a text."""
    begin = content[:1000].decode("utf-8", "replace").rstrip("\ufffd")  # the last character may be cut
    return bool(begin) and all(char.isprintable() or char in "\t\r\n\f" for char in begin)
