"""Hosts that ship with Esper: `cnn`, `timm`, `transformers`."""
