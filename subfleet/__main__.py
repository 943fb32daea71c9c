"""`python -m subfleet` is the command `subfleet`."""

import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036 - a cluster's may be older than the sender's
    here, sender = sys.version.split()[0], os.environ.get("SUBFLEET_SENT_BY", "your shell")
    sys.exit(
        f"error: this is Python {here}, started by {sender}; subfleet needs Python 3.11 or newer: "
        "start the cluster with one"
    )

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
