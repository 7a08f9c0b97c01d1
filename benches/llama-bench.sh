#!/usr/bin/env bash
# Builds llama.cpp's llama-bench from the sources in PyPI's llama-cpp-python, and prints the program's path.
# Usage: exo-benches --llama-bench "$(benches/llama-bench.sh)" MODEL.gguf…
set -euo pipefail
cd "$(dirname "$0")/.."

VERSION=0.3.36
folder="${CARGO_TARGET_DIR:-target}/llama.cpp-$VERSION"
program="$folder/build/bin/llama-bench"
{
  mkdir -p "$folder"
  if [ ! -x "$program" ]; then
    command -v cmake >/dev/null || python3 -m pip install --quiet cmake
    python3 -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$folder" "llama-cpp-python==$VERSION"
    tar --extract --gzip --directory "$folder" --strip-components 1 --file "$folder/llama_cpp_python-$VERSION.tar.gz"
    source="$folder/vendor/llama.cpp"
    # GCC 12 moves the writes of the tile configuration behind the instruction that loads it, which then faults.
    sed -i 's/^    _tile_loadconfig(&tc);/    __asm__ volatile("" ::: "memory");\n    _tile_loadconfig(\&tc);/' \
      "$source/ggml/src/ggml-cpu/amx/mmq.cpp"
    cmake -S "$source" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
      -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_EXAMPLES=OFF
    cmake --build "$folder/build" --target llama-bench --parallel
  fi
} >&2
realpath "$program"
