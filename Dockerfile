# nemo_spin on NVIDIA's PyTorch container, which brings CUDA, PyTorch, TransformerEngine and Apex.
#
#   docker build -t nemo-spin .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v /models:/models -v /data:/data nemo-spin \
#       nemo-spin train trainer.devices=8 model.tensor_model_parallel_size=8 ...
#
# Not built yet: no container engine was at hand when this was written. The container's Python has to be 3.12.
ARG BASE=nvcr.io/nvidia/pytorch:25.11-py3
FROM ${BASE}

WORKDIR /opt/nemo_spin
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY nemo_spin nemo_spin

# The container's own builds stay: pip may add packages, but not replace torch or what is compiled against it.
RUN pip list --format=freeze \
        | grep -iE '^(torch|torchvision|triton|pytorch-triton|transformer[-_]engine|apex|flash[-_]attn|numpy)==' \
        > /tmp/constraints.txt \
    && cat /tmp/constraints.txt \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt '.[zarr,tiktoken]' \
    && python -c 'import torch; assert torch.version.cuda, "torch was replaced by a build without CUDA"'

COPY examples examples
