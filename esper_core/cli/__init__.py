"""The `esper` command: parses, calls the core, prints."""
