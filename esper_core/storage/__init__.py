"""Files of tensors, JSON and TOML, checked when they are read and written atomically."""
