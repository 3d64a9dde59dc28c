#!/usr/bin/env bash
# What `make gpu-check` needs, brought to a GPU machine that can fetch nothing and takes 64 MiB a call.
#
# The machine: x86-64, Python 3.12 as python3 with torch 2.11 (CUDA 13), onnx, onnxruntime, onnxscript, safetensors,
# scikit-learn, scipy, matplotlib, opencv, rich, typer, pytest, make; a driver for CUDA 13. Brought along:
#
#   tensorrt_rtx_cu13_libs 95.2 MB     tensorrt_rtx_cu13_bindings 1.2 MB    tensorrt_rtx_cu13 0.02 MB (source, pure Python)
#   cuda_bindings 8.4 MB               cuda_core 6.6 MB                     cuda_pathfinder 0.1 MB
#   pillow 7.1 MB                      cryptography 4.8 MB, cffi 0.2 MB     nvtx 3.1 MB
#   msgspec 0.2 MB
#
# 127 MB as wheels; installed and compressed again, 81 MB, in two parts of 41 MB. pydicom and imagecodecs (29 MB) are
# left out: they are imported for DICOM files only, so IMAGES must be a folder of PNG or JPEG files.
#
# Here, once (4 minutes on 2 cores, nearly all of it xz):     bash benchmarks/gpu-carry.sh pack
# Call 1, with .gpu/1 carried (seconds):                      bash benchmarks/gpu-carry.sh keep 1
# Call 2, with .gpu/2 carried, before the machine is given back (it stays warm for 30 s; 9 minutes):
#                                                             bash benchmarks/gpu-carry.sh keep 2 && bash benchmarks/gpu-carry.sh check
# More of it while the machine is warm, nothing carried:      bash benchmarks/gpu-carry.sh check PART=peers
# Results lie in $OUT afterwards: put the JSON under benchmarks/results/.
set -euo pipefail
cd "$(dirname "$0")/.."

kept=/tmp/gpu-check-kept site=/tmp/gpu-check-site
wheels=(
    tensorrt_rtx_cu13_libs==1.7.1.116 tensorrt_rtx_cu13_bindings==1.7.1.116 cuda-core==1.2.2 cuda-bindings==13.5.0
    cuda-pathfinder==1.9.0 pillow==13.0.0 msgspec==0.22.0 cryptography==50.0.2 cffi==2.1.1 nvtx==0.2.17
)

pack() {
    local exclude platforms=() made
    exclude=$(git rev-parse --git-path info/exclude)
    mkdir -p "$(dirname "$exclude")"
    grep -qsx '/.gpu/' "$exclude" || echo '/.gpu/' >>"$exclude"
    for glibc in 34 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
    made=$(mktemp -d)
    python3 -m pip install -q --no-deps --no-compile --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" --target "$made/site" "${wheels[@]}"
    python3 -m pip install -q --no-deps --no-compile --target "$made/site" tensorrt_rtx_cu13==1.7.1.116
    rm -rf .gpu && mkdir -p .gpu/1 .gpu/2
    tar -C "$made/site" -c . | xz -T0 --x86 --lzma2=preset=6,dict=64MiB >"$made/site.tar.xz"
    split -n 2 -d -a 1 --numeric-suffixes=1 "$made/site.tar.xz" "$made/part"
    mv "$made/part1" .gpu/1/part1 && mv "$made/part2" .gpu/2/part2
    sha256sum "$made/site.tar.xz" | cut -d' ' -f1 | tee .gpu/1/sha256 >.gpu/2/sha256
    git rev-parse HEAD | tee .gpu/1/commit >.gpu/2/commit
    rm -rf "$made"
    du -h .gpu/*
}

keep() { mkdir -p "$kept" && cp ".gpu/$1"/* "$kept/" && ls -l "$kept"; }

check() {
    if [ ! -e "$site/.complete" ]; then
        cat "$kept/part1" "$kept/part2" >"$kept/site.tar.xz"
        echo "$(cat "$kept/sha256")  $kept/site.tar.xz" | sha256sum --check --quiet
        # Python's own, since xz need not be installed.
        python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1], "r:xz").extractall(sys.argv[2], filter="tar")' \
            "$kept/site.tar.xz" "$site"
        touch "$site/.complete"
    fi
    local status=0
    COMMIT=$(cat "$kept/commit") PYTHONPATH=$site make -s gpu-check PYTHON=python3 "$@" || status=$?
    cp benchmarks/results/gpu-check-*.json "${OUT:?where the results go}/" || true
    return $status
}

"$@"
