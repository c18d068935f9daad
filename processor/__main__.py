"""`embedding-processor`, and `python -m processor`: see `processor.cli.commands`."""

from __future__ import annotations

from processor.cli.commands import main

if __name__ == "__main__":
    main()
