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

# A cluster of N nodes on this machine, until Ctrl-C: their APIs on ports 52601 and up, their data in target/cluster.
cluster N="3":
    T="$(cargo run -q --release --locked -- token --data-dir target/cluster/1)" && trap 'kill 0' EXIT && for n in $(seq {{N}}); do cargo run -q --release --locked -- up --name node$n --data-dir target/cluster/$n --listen 127.0.0.1:$((52500 + n)) --peer 127.0.0.1:52501 --join "$T" --no-discovery --api 127.0.0.1:$((52600 + n)) & done; wait

# One seeded simulation of the cluster, as a failing test prints it.
sim SEED:
    EXO_SIM_SEED={{SEED}} cargo nextest run --locked -p exo-actors core::tests
