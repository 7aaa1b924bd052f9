"""Emrakul, the reaper: audits by withering; deletion is the side-effect of a failed test."""
