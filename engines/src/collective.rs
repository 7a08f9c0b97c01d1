//! Sums over the ranks of a tensor-sharded layer.
//!
//! A layer that is split by columns and rows needs two sums over its ranks: after attention's output projection and
//! after the feed-forward's down projection. The decoder calls this port for both, so tensor sharding needs a transport
//! and sliced weights, but no second decoder.

/// Adds up partial results over the ranks of a layer.
pub trait AllReduce {
    /// Returns the number of ranks, at least 1. With one rank, the decoder skips the exchange.
    fn ranks(&self) -> u32;

    /// Replaces `partial`, \[rows]\[hidden width], by its sum over all ranks. Every rank adds in order of rank, so that
    /// all ranks get the same bits.
    ///
    /// # Errors
    /// [`AllReduceError`] if a peer does not answer.
    fn sum(&mut self, partial: &mut [f32]) -> Result<(), AllReduceError>;
}

/// A rank did not send its partial sum.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("rank {rank} did not send its partial sum of a layer")]
pub struct AllReduceError {
    /// The silent rank, from 0.
    pub rank: u32,
}

/// The exchange of a layer that is not tensor-sharded: a single rank.
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
