//! Seeded simulation: of a head over its pipeline, and of a cluster's planning.
//!
//! Every failing run prints its seed; `EXO_SIM_SEED` makes that run again.

mod cluster;
mod head;

/// xorshift64*, for the simulation only.
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

/// The one that is asked for, or so many.
fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("EXO_SIM_SEED") {
        Ok(seed) => vec![seed.parse().expect("EXO_SIM_SEED is a number")],
        Err(_) => (0..count).collect(),
    }
}
