"""``python -m pymla``."""

import os

try:
    from pymla.cli import main

    main()
except KeyboardInterrupt:  # of the import: `main` answers interrupts by itself
    os._exit(130)
