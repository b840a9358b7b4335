from __future__ import annotations

import subprocess
import sys


def test_torch_s_device_contexts_keep_working() -> None:
    """transformers builds models in one; in a process of its own, because torch looks the factories up once."""
    script = """
import torch
from nemo_spin.megatron import cpu_backend
cpu_backend.install()
with torch.device("meta"):
    print({factory([2.0]).device.type for factory in (torch.tensor, torch.as_tensor)} | {torch.zeros(1).device.type})
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'meta'}"
