"""`python -m recray` is `recray`."""

from recray.cli import main

if __name__ == "__main__":
    main()
