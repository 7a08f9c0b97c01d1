#!/usr/bin/env bash
# Runs all checks: format, lints, unit, integration and documentation tests, licences. Installs missing tools.
# Arguments go to the test runner, as in `./test.sh -p exo-engines`.
set -euo pipefail
cd "$(dirname "$0")"

say() { printf '\n== %s\n' "$*"; }

say "tools"
command -v python3 >/dev/null || { apt-get update -qq && apt-get install -y -qq python3 python3-pip; }
python3 -m pip --version >/dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq python3-pip; }
command -v cc >/dev/null || { apt-get update -qq && apt-get install -y -qq build-essential; }
# An OpenCL runtime for the CPU, for the tests of the OpenCL engine; without one, these report that they are skipped.
[ -n "$(ls /etc/OpenCL/vendors 2>/dev/null)" ] || [ -n "${OCL_ICD_VENDORS:-}" ] ||
  { apt-get update -qq && apt-get install -y -qq ocl-icd-libopencl1 pocl-opencl-icd; } || true
# Tests between hosts run in network namespaces; without permission for these, the tests report that they are skipped.
command -v ip >/dev/null || { apt-get update -qq && apt-get install -y -qq iproute2; } || true
command -v cargo-nextest >/dev/null || cargo install --locked cargo-nextest
command -v cargo-deny >/dev/null || cargo install --locked cargo-deny

# OpenAI's own client, for the API's test. It stays in the build folder.
export EXO_TEST_PYTHON="${CARGO_TARGET_DIR:-target}/python/bin/python"
if ! "$EXO_TEST_PYTHON" -c 'import openai' 2>/dev/null; then
  python3 -m venv "${EXO_TEST_PYTHON%/bin/python}" 2>/dev/null || {
    apt-get update -qq && apt-get install -y -qq python3-venv && python3 -m venv --clear "${EXO_TEST_PYTHON%/bin/python}"
  }
  "$EXO_TEST_PYTHON" -m pip install --quiet 'openai>=3,<4'
fi
EXO_TEST_PYTHON="$(realpath --no-symlinks "$EXO_TEST_PYTHON")"

say "format"
cargo fmt --all --check

say "lints"
cargo clippy --workspace --all-targets --locked -- -D warnings
cargo clippy --lib --no-default-features --locked -- -D warnings
cargo clippy --lib --no-default-features --features http --locked -- -D warnings

say "licences and sources"
# Advisories are not checked here: their database comes from the network. With network: `cargo deny check advisories`.
cargo fetch --locked # the crates of all platforms: their licences count, though they are not built here
cargo deny --offline check bans licenses sources

# Without namespaces, tests between hosts pass without testing anything, so the last line says so, too.
skipped=
if ip netns add exo-probe 2>/dev/null; then ip netns delete exo-probe; else
  skipped="SKIPPED: no network namespaces here: nothing was tested between hosts (hosts, relay, cut cables)"
fi

untested=
[ -n "$(ls /etc/OpenCL/vendors 2>/dev/null)" ] || [ -n "${OCL_ICD_VENDORS:-}" ] ||
  untested="SKIPPED: no OpenCL runtime here: the OpenCL engine was not tested"

say "tests"
[ -z "$skipped" ] || say "$skipped"
[ -z "$untested" ] || say "$untested"
cargo nextest run --workspace --locked --no-fail-fast "$@"

say "documentation"
cargo test --workspace --doc --locked
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked
[ -z "$skipped" ] || say "$skipped"
[ -z "$untested" ] || say "$untested"
