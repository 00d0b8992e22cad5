"""``python -m carsam``: the console script, also where it is not on the path."""

from carsam.cli import main

if __name__ == "__main__":
    main()
