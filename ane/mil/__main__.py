"""``python -m ane.mil PACKAGE``."""

from ane.mil.command import main

if __name__ == "__main__":
    main()
