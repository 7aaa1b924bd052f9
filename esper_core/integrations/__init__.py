"""Growth inside other libraries' training loops. Each module here needs its library; none is imported by the core."""
