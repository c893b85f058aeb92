"""Every error recray raises on purpose.

    RecrayError
    ├── ConfigError       a setting is unknown, of the wrong type, or contradicts another
    ├── DataError         the logs, the catalogue or a table can't be used
    ├── CatalogueError    titles, tokenizer and prompt do not fit together
    ├── ModelError        a model folder can't be loaded or does not fit the tokenizer
    └── WorkspaceError    a workspace is of another configuration, incomplete, or out of date

A message says what was got, what was expected and what to do. These errors cross process borders,
so each takes exactly one argument: pickling an exception calls its class with `args`.
"""


class RecrayError(Exception):
    """Base of all errors recray raises on purpose; the CLI prints its message without a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


class ConfigError(RecrayError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class DataError(RecrayError):
    """The logs, the catalogue or a table can't be used; names the file and, where there is one, the row."""


class CatalogueError(RecrayError):
    """Titles, tokenizer and prompt do not fit together."""


class ModelError(RecrayError):
    """A model folder can't be loaded, or does not fit its tokenizer."""


class WorkspaceError(RecrayError):
    """A workspace is of another configuration, incomplete, or out of date."""
