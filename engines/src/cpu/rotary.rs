//! Rotary position embeddings, with tables computed once per step.

use crate::backend::Batch;
use crate::model::{Pairing, Rope};

/// cos and sin for every row of a step.
#[derive(Debug)]
pub(super) struct Rotations {
    pairing: Pairing,
    pairs: usize,
    /// \[row]\[pair].
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl Rotations {
    pub(super) fn new(rope: &Rope, batch: &Batch) -> Self {
        let pairs = rope.frequencies.len();
        let mut cosines = Vec::with_capacity(batch.rows * pairs);
        let mut sines = Vec::with_capacity(batch.rows * pairs);
        for span in &batch.spans {
            for position in span.first_position..span.first_position + span.rows.len() {
                for frequency in &rope.frequencies {
                    let (sine, cosine) = (position as f32 * frequency).sin_cos();
                    cosines.push(cosine * rope.magnitude);
                    sines.push(sine * rope.magnitude);
                }
            }
        }
        Self { pairing: rope.pairing, pairs, cosines, sines }
    }

    /// Rotates one head of row `row`, in place.
    #[inline(always)]
    pub(super) fn turn(&self, row: usize, head: &mut [f32]) {
        let cosines = &self.cosines[row * self.pairs..][..self.pairs];
        let sines = &self.sines[row * self.pairs..][..self.pairs];
        match self.pairing {
            Pairing::Halves => {
                let (low, high) = head.split_at_mut(self.pairs);
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
}
