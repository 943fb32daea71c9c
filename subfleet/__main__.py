"""`python -m subfleet` is the command `subfleet`."""

from subfleet.cli import main

if __name__ == "__main__":
    main()
