"""Every error recray raises on purpose.

    RecrayError
    ├── ConfigError       a setting is unknown, of the wrong type, or contradicts another
    ├── DataError         the logs, the catalogue or a table can't be used
    ├── CatalogueError    titles, tokenizer and prompt do not fit together
    ├── ModelError        a model folder can't be loaded or does not fit the tokenizer
    ├── WorkspaceError    a workspace is of another configuration, incomplete, or out of date
    ├── CheckpointError   the state of an interrupted fit can't be written, read or converted
    ├── DivergenceError   losses or gradients are no longer finite; names the rows
    └── StopRequestedError, MachineLeavingError   a fit was told to end, and has written its checkpoint

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


class CheckpointError(RecrayError):
    """The state of an interrupted fit can't be written, read or converted."""


class DivergenceError(RecrayError):
    """Losses or gradients were not finite in too many steps; names the rows that caused it."""


class StopRequestedError(RecrayError):
    """The run was told to end; its checkpoint is written."""


class MachineLeavingError(RecrayError):
    """A worker was told that its machine goes away; the checkpoint is written, and the fit goes on elsewhere."""
