"""Patches that come with the package: fitted controllers for models whose weights are the user's
own.
"""

from pathlib import Path

SHIPPED = Path(__file__).parents[2] / "patches"


def shipped() -> list[str]:
    """The names of the patches that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/router.json"))


def folder_of(patch: Path | str) -> Path:
    """Where a patch lies: a folder of the user's, or one that came with the package, by its
    name.
    """
    own = Path(patch)
    if own.exists() or str(patch) not in shipped():
        return own
    return SHIPPED / str(patch)
