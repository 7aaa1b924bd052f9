"""Emrakul: audits of seeds by withering."""
