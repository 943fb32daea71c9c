"""`python -m subfleet` is the command `subfleet`."""

import sys

import subfleet

if __name__ == "__main__":
    if subfleet.__file__ is None:
        # Python found a plain folder of that name first, such as the clone seen from its parent.
        sys.exit(
            "error: the folder 'subfleet' in the current folder hides the package; "
            "use the command `subfleet`, or start in another folder"
        )
    from subfleet.cli import main

    main()
