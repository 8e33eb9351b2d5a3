"""Makes ``python -m tokenprune`` run the console script ``tokenprune``."""

from tokenprune.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
