"""250 scientific papers of computational linguistics, from the package aclsum, for runs that need real long text.

They are downloaded once, and kept outside the repository.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

WHEEL = "aclsum-0.1.2-py3-none-any.whl"
SHA256 = "c75ffc48d3eabc5f37c68ea087943780a85950087957759e89746f21111f2213"
REQUIREMENT = "aclsum==0.1.2"
_PAPERS = "aclsum/dataset/paper_jsons/"


def default_cache() -> Path:
    """Returns the user's folder for what can be downloaded again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "led_kernels"


def download(cache: Path) -> Path:
    """Returns the wheel in ``cache``, which pip fetches if it is not there.

    Raises:
        RuntimeError: when pip cannot fetch it, or it is another file than was published.
    """
    wheel = cache / WHEEL
    if not wheel.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(cache), REQUIREMENT]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not wheel.exists():
            said = (done.stderr.strip().splitlines() or ["it downloaded no wheel"])[-1]
            raise RuntimeError(f"pip cannot download {REQUIREMENT}: {said}")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        raise RuntimeError(f"{wheel} is not the published {WHEEL}; delete it, and it is downloaded again.")
    return wheel


def read_papers(wheel: Path) -> list[str]:
    """Returns the papers' bodies, without abstracts, notes and references, in the order of their names."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(
            name for name in archive.namelist() if name.startswith(_PAPERS) and name.endswith(".json")
        )
        papers = [json.loads(archive.read(name)) for name in names]
    return ["\n".join(part["text"] for part in paper["pdf_parse"]["body_text"]) for paper in papers]
