//! The machine's own limits, measured: what no kernel can exceed.

use super::lines::Lines;
use super::thread_pool::{Panicked, ThreadPool};
#[cfg(target_arch = "x86_64")]
use crate::simd::amx;
use crate::simd::{Kernel, LANES, Simd, Tier};
use std::hint::black_box;
use std::time::{Duration, Instant};

/// The limits of some threads of this CPU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Bytes per second that the threads read together from memory.
    pub read_bytes_per_s: f64,
    /// Operations per second of the tier's instruction for products of bytes: two for each pair of bytes. A weight of
    /// 4 to 8 bits times a 16-bit activation needs two such products, a 16-bit weight four (on tiles) or as many
    /// instructions as four.
    pub byte_operations_per_s: f64,
}

/// Bytes of a measured read: more than the caches of most processors.
const READ_BYTES: usize = 256 << 20;
/// Bytes of one task of a measured read.
const TASK_BYTES: usize = 4 << 20;
/// Rounds of a measured product.
const ROUNDS: usize = 1 << 18;
/// Runs of which the fastest counts: other work on the machine only slows runs down.
const RUNS: usize = 5;

/// Measures the limits of `pool`'s threads. It takes about half a second.
pub(super) fn measure(tier: Tier, pool: &mut ThreadPool) -> Result<Limits, Panicked> {
    // The fallback is the allocator's memory, which may be in smaller pages.
    let mut memory = Lines::reserved_huge(READ_BYTES).unwrap_or_else(|_| Lines::zeroed(READ_BYTES));
    // Memory that was never written is one page of zeros.
    memory.bytes_mut().fill(1);
    let read = fastest(pool, |pool| {
        pool.run(READ_BYTES / TASK_BYTES, &|task| {
            tier.run(Read { bytes: &memory.bytes()[task * TASK_BYTES..][..TASK_BYTES] });
        })
    })?;
    let threads = pool.threads();
    let product = fastest(pool, |pool| pool.run(threads, &|_| products(tier)))?;
    let operations = 2 * pairs(tier) * ROUNDS * threads;
    Ok(Limits {
        read_bytes_per_s: READ_BYTES as f64 / read.as_secs_f64(),
        byte_operations_per_s: operations as f64 / product.as_secs_f64(),
    })
}

fn fastest(
    pool: &mut ThreadPool,
    mut work: impl FnMut(&mut ThreadPool) -> Result<(), Panicked>,
) -> Result<Duration, Panicked> {
    work(pool)?;
    let mut least = Duration::MAX;
    for _ in 0..RUNS {
        let started = Instant::now();
        work(pool)?;
        least = least.min(started.elapsed());
    }
    Ok(least)
}

struct Read<'a> {
    bytes: &'a [u8],
}

impl Kernel for Read<'_> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        // SAFETY: every chunk has four vectors.
        unsafe {
            // Four sums, so that no addition waits for another.
            let mut sums = [S::ints_zero(); 4];
            for chunk in self.bytes.chunks_exact(4 * VECTOR_BYTES) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = S::add_ints(*sum, S::load_ints(chunk.as_ptr().add(i * VECTOR_BYTES).cast()));
                }
            }
            black_box(sums);
        }
    }
}

/// Bytes of a vector of codes.
const VECTOR_BYTES: usize = 4 * LANES;
/// Sums of [`Dots`]: enough to hide the latency of a product.
const CHAINS: usize = 12;

/// Runs [`ROUNDS`] rounds of products, on one thread.
fn products(tier: Tier) {
    #[cfg(target_arch = "x86_64")]
    if tier == Tier::Amx {
        return tile_products();
    }
    tier.run(Dots);
}

/// Pairs of bytes that one round of [`products`] multiplies.
fn pairs(tier: Tier) -> usize {
    match tier {
        Tier::Amx => TILE_PAIRS,
        _ => CHAINS * VECTOR_BYTES,
    }
}

struct Dots;

impl Kernel for Dots {
    #[inline(always)]
    fn run<S: Simd>(self) {
        let bytes = black_box([1_u8; VECTOR_BYTES]);
        // SAFETY: `bytes` is one vector.
        unsafe {
            let codes = S::codes(bytes.as_ptr());
            let mut sums = [S::ints_zero(); CHAINS];
            for round in 0..ROUNDS {
                for sum in &mut sums {
                    *sum = S::dot(*sum, codes, round as i32);
                }
            }
            black_box(sums);
        }
    }
}

/// Pairs of bytes of one round of tiles: four products of 16 × 64 × 16.
const TILE_PAIRS: usize = 4 * 16 * 64 * 16;

#[cfg(target_arch = "x86_64")]
fn tile_products() {
    // SAFETY: a backend of this tier exists, so tiles are available, and this thread has no others.
    unsafe { amx::Tiles::configure().multiply_alone(ROUNDS) };
}
