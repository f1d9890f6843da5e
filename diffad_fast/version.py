from __future__ import annotations

import hashlib
from pathlib import Path

__version__ = "0.1.0"


def digest_of_sources(folder: Path) -> str:
    """16 hexadecimal digits of the C++ and CUDA sources below ``folder``, their names included.

    setup.py builds them into the library, :mod:`diffad_fast.native` compares.
    """
    files = (path for kind in ("cpp", "cu", "h") for path in folder.rglob(f"*.{kind}"))
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
