"""NeMo 1: `.nemo` archives and unpacked directories."""
