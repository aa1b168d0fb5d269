#!/usr/bin/env bash
# cibuildwheel runs this once in its container for Linux. CUDA_REPOSITORY, if it is set, is the address
# of NVIDIA's dnf repository file for RHEL 8 and this architecture: CUDA 12.8 comes from there, the
# oldest that compiles for all cards that the wheels serve. Else the build takes the compiler of PyPI.
set -euo pipefail
[ -n "${CUDA_REPOSITORY:-}" ] || exit 0
dnf install -y dnf-plugins-core
dnf config-manager --add-repo "$CUDA_REPOSITORY"
dnf install -y cuda-nvcc-12-8 cuda-cudart-devel-12-8
[ -e /usr/local/cuda ] || ln -s cuda-12.8 /usr/local/cuda
/usr/local/cuda/bin/nvcc --version
