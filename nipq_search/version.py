"""Version of the package, in a module of its own so that every layer can import it.

Keep it equal to the version in `pyproject.toml`.
"""

__version__ = "0.1.0"
