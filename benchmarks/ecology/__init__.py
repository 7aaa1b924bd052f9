"""Protocols of the ecology: audits, regions, organs and long horizons. `python -m benchmarks.ecology PROTOCOL`."""
