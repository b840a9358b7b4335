"""NeMo 2: directories with `context/`."""
