//! Randomness for ids and seeds.

/// A random number, different for each call on all nodes. It is not suited as a secret.
pub fn fresh_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The operating system's random bytes key each of std's hashers.
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}
