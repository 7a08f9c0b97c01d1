//! Seeded simulations of a head's scheduler over a pipeline, of a cluster's planning, and of devices that fail.
//!
//! Each run prints its seed. `EXO_SIM_SEED` repeats the run of one seed; `EXO_SIM_SEEDS` sets the number of runs.

mod cluster;
mod failover;
mod head;

/// The random numbers of the simulations: xorshift64*.
struct Random(u64);

impl Random {
    fn of(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % limit
    }
}

/// The seed in `EXO_SIM_SEED`, or as many seeds as `EXO_SIM_SEEDS` says, or `count`.
fn seeds(count: u64) -> Vec<u64> {
    let number = |name| std::env::var(name).ok().map(|value| value.parse().expect("a seed is a number"));
    match number("EXO_SIM_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("EXO_SIM_SEEDS").unwrap_or(count)).collect(),
    }
}
