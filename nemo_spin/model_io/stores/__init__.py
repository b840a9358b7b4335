"""How weights are stored: torch_dist, zarr and safetensors, behind one interface."""
