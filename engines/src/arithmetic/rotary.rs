//! Rotary position embeddings.
//!
//! The tables are computed on the host, with the `libm` crate: a system's own sine differs from one system to the next.

use crate::model::{Pairing, Rope};

/// The cosine and the sine of each pair at `position`, times the rope's magnitude.
pub fn table(rope: &Rope, position: usize) -> impl Iterator<Item = (f32, f32)> {
    rope.frequencies.iter().map(move |frequency| {
        let (sine, cosine) = libm::sincosf(position as f32 * frequency);
        (cosine * rope.magnitude, sine * rope.magnitude)
    })
}

/// Rotates one head in place: (a, b) becomes (a·cos − b·sin, b·cos + a·sin), where every product and sum is rounded.
/// `cosines` and `sines` have one value for each pair; dimensions behind the pairs do not change.
#[inline(always)]
pub fn turn(pairing: Pairing, cosines: &[f32], sines: &[f32], head: &mut [f32]) {
    match pairing {
        Pairing::Halves => {
            let (low, high) = head.split_at_mut(cosines.len());
            for (((a, b), c), s) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
                (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
            }
        }
        Pairing::Neighbours => {
            for (([a, b], c), s) in head.as_chunks_mut::<2>().0.iter_mut().zip(cosines).zip(sines) {
                (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
            }
        }
    }
}
