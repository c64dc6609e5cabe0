"""The plugin contract under its old name, for one level: plugins import from penstock.core.contract.hookspecs.

What it is: an alias.
What it does not know: anything.
"""

from penstock.core.contract.hookspecs import *  # noqa: F403
from penstock.core.contract.hookspecs import hookimpl as hookimpl
