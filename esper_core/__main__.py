"""`python -m esper_core` is `esper`."""

from esper_core.cli.main import main

if __name__ == "__main__":
    main()
