//! Seeded chaos.
