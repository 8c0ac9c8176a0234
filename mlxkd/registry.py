"""A folder is a listing: the name of a module is the name people write in a recipe.

Listing never imports, so choices in recipes, commands and docs cost nothing; an ImportError
inside a chosen module propagates unchanged. Sub-packages and names that start with an
underscore are not members.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from mlxkd.errors import unknown


def listing(package: ModuleType) -> tuple[str, ...]:
    """Names of the members of ``package``, sorted."""
    found = pkgutil.iter_modules(package.__path__)
    return tuple(sorted(m.name for m in found if not m.ispkg and not m.name.startswith("_")))


def member(package: ModuleType, name: str, *, kind: str | None = None) -> ModuleType:
    """Import the member called ``name``; raises UserError with the nearest known name."""
    if name not in listing(package):
        raise unknown(kind or package.__name__.rsplit(".", 1)[-1], name, listing(package))
    return importlib.import_module(f"{package.__name__}.{name}")
