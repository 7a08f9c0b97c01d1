# Short forms of the commands that CONTRIBUTING.md names. Nothing depends on them.

# Format and lints.
check:
    cargo fmt --all --check && cargo clippy --workspace --all-targets --locked -- -D warnings

# Everything that must hold before a change lands; arguments go to the test runner.
test *ARGS:
    ./test.sh {{ARGS}}

# Speed beside the peers, on the same files; arguments go to the bench.
bench *ARGS:
    cargo run --release --locked -p exo-benches --bin exo-benches -- {{ARGS}}

# A cluster of N processes on this machine, from start to measured answer.
cluster N="3":
    cargo run --release --locked -p exo-benches --bin exo-cluster-benches -- pipeline --nodes {{N}}

# One seeded simulation of the cluster, as a failing test prints it.
sim SEED:
    EXO_SIM_SEED={{SEED}} cargo nextest run --locked -p exo-actors core::tests
