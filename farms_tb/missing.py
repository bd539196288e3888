"""What to say where a package of an extra cannot be imported."""

from __future__ import annotations


def cannot_import(what: str, error: BaseException, remedy: str) -> str:
    """Return a sentence that names a package that is missing, or says why one that is installed fails.

    Args:
        what: what needs the package, as the beginning of a sentence: `"drawing"`.
        error: what importing the package raised.
        remedy: what helps where it is missing, as the end of the sentence: `'pip install "farms-tb[plot]"'`.
    """
    missing = missing_package(error)
    if missing:
        return f"{what} needs {missing.replace('_', '-')}: {remedy}"
    reason = f"{type(error).__name__}: {error}"
    broken = f"{what} needs a package that is installed and fails when it is imported ({reason:.300})"
    return f"{broken}; another version of it may do: {remedy}"


def missing_package(error: BaseException) -> str:
    """Return the name of the package that an import did not find; empty for any other fault of an import."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    return (name or "").partition(".")[0]
