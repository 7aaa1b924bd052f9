"""Files: tensors, JSON and TOML, read with suspicion and written as a whole or not at all."""
