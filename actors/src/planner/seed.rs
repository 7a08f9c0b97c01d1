//! Randomness for ids and seeds.

/// A number that no other call gives, on this node or another one. It is not a secret.
pub fn fresh_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The operating system's random bytes key each of std's hashers.
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}
