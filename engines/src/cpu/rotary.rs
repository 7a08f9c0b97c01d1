//! Rotary position embeddings, with tables computed once per step.

use crate::arithmetic::rotary;
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
                for (cosine, sine) in rotary::table(rope, position) {
                    cosines.push(cosine);
                    sines.push(sine);
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
        rotary::turn(self.pairing, cosines, sines, head);
    }
}
