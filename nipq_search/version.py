"""Version of the package, in a module of its own so that every layer can import it.

`pyproject.toml` states it too.
"""

__version__ = "0.1.0"
