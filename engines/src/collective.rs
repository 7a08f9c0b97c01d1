//! Where the ranks of a tensor-sharded layer meet.
//!
//! A layer of a model that is cut by columns and rows has two sums over its ranks: after attention's output
//! projection and after the feed-forward's. The decoder takes both through this port, so that cutting a layer is a
//! transport and a slicing of weights, not another decoder.

/// Adds up partial results over the ranks of a layer.
pub trait AllReduce {
    /// How many ranks there are; the decoder skips the exchange where it is 1.
    fn ranks(&self) -> u32;

    /// Replaces `partial`, rows of the hidden width side by side, by its sum over all ranks. The order of the
    /// addition is by rank on every rank, so that all get the same bits.
    ///
    /// # Errors
    /// [`AllReduceError`] where a peer does not answer.
    fn sum(&mut self, partial: &mut [f32]) -> Result<(), AllReduceError>;
}

/// A rank did not bring its part.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("rank {rank} did not bring its part of a layer's sum")]
pub struct AllReduceError {
    pub rank: u32,
}

/// The only rank there is.
#[derive(Debug, Clone, Copy, Default)]
pub struct SingleRank;

impl AllReduce for SingleRank {
    fn ranks(&self) -> u32 {
        1
    }

    fn sum(&mut self, _partial: &mut [f32]) -> Result<(), AllReduceError> {
        Ok(())
    }
}
