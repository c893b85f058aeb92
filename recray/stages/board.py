"""What a driver says to its workers, in a process of its own. Imports nothing, so that it is there at once."""


class Board:
    """Whether the run shall end."""

    def __init__(self) -> None:
        self._told = False

    def tell(self) -> None:
        """Say that it shall."""
        self._told = True

    def told(self) -> bool:
        """Whether that was said."""
        return self._told
