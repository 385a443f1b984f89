"""`python -m corrmatch`."""

from corrmatch.cli import main

raise SystemExit(main())
