//! The products of a few queries with one page of keys or values.

use super::super::cache::TOKENS;
use super::stored::Stored;
use crate::arithmetic::attention::CHUNK;
use crate::arithmetic::cache::BLOCK;
use crate::simd::{LANES, Simd, prefetch};
use std::ops::Range;

/// Writes the products of `N` queries, of `head_dim` values each, with all 32 keys of a page, visible or not, to
/// `scores` from `slot` on. Asks for `next`, the page that is read next.
#[inline(always)]
pub(super) fn scores<S: Simd, E: Stored, const N: usize>(
    queries: &[&[f32]; N],
    keys: &[u8],
    next: &[u8],
    scores: &mut [[f32; CHUNK]],
    slot: usize,
) {
    let head_dim = queries[0].len();
    assert!(keys.len() >= E::page_bytes(head_dim), "a page holds all dimensions of its keys");
    assert!(queries.iter().all(|query| query.len() == head_dim), "all queries have the same dimensions");
    // SAFETY: the assertions.
    unsafe {
        let zero = S::splat(0.0);
        let mut sums = [[zero; 2]; N];
        for block in 0..head_dim.div_ceil(BLOCK) {
            let scales = keys.as_ptr().add(E::scales_at(head_dim, block));
            let scales = [E::scales::<S>(scales), E::scales::<S>(scales.add(LANES * 2))];
            for dimension in block * BLOCK..((block + 1) * BLOCK).min(head_dim) {
                let at = dimension * TOKENS * E::BYTES;
                prefetch(next.as_ptr().wrapping_add(at));
                let lower = E::load::<S>(keys.as_ptr().add(at), scales[0]);
                let upper = E::load::<S>(keys.as_ptr().add(at + LANES * E::BYTES), scales[1]);
                for (sums, query) in sums.iter_mut().zip(queries) {
                    let value = S::splat(*query.get_unchecked(dimension));
                    sums[0] = S::fma(lower, value, sums[0]);
                    sums[1] = S::fma(upper, value, sums[1]);
                }
            }
        }
        for (scores, sums) in scores.iter_mut().zip(sums) {
            let page = &mut scores[slot..slot + TOKENS];
            S::store(page.as_mut_ptr(), sums[0]);
            S::store(page.as_mut_ptr().add(LANES), sums[1]);
        }
    }
}

/// Adds weights · values to the sums of `N` queries, over the tokens `within` a page, whose weights start at `slot` of
/// a chunk. Asks for `next`, the page that is read next.
#[inline(always)]
pub(super) fn mix<S: Simd, E: Stored, const N: usize>(
    weights: &[[f32; CHUNK]],
    slot: usize,
    within: Range<usize>,
    [values, next]: [&[u8]; 2],
    sums: &mut [f32],
) {
    let padded = sums.len() / N;
    assert!(within.end <= TOKENS && values.len() >= E::page_bytes(padded), "a page holds all its values");
    assert!(weights.len() >= N && slot + within.len() <= CHUNK, "each value has weights");
    let mut first = 0;
    // SAFETY: the assertions; `padded` is a multiple of the lanes, and `next` is only asked for.
    unsafe {
        while first + 2 * LANES <= padded {
            dimensions::<S, E, N, 2>(weights, slot, within.clone(), [values, next], first, sums);
            first += 2 * LANES;
        }
        if first < padded {
            dimensions::<S, E, N, 1>(weights, slot, within, [values, next], first, sums);
        }
    }
}

/// [`mix`] of `VECTORS` vectors of dimensions from `first` on, which share a scale.
///
/// # Safety
/// Call only inside a kernel of `S`, with arguments that [`mix`] has checked.
#[inline(always)]
unsafe fn dimensions<S: Simd, E: Stored, const N: usize, const VECTORS: usize>(
    weights: &[[f32; CHUNK]],
    slot: usize,
    within: Range<usize>,
    [values, next]: [&[u8]; 2],
    first: usize,
    sums: &mut [f32],
) {
    let padded = sums.len() / N;
    // SAFETY: the caller upholds the contract of this function.
    unsafe {
        let mut lanes = [[S::splat(0.0); VECTORS]; N];
        for (i, lanes) in lanes.iter_mut().enumerate() {
            for (v, lanes) in lanes.iter_mut().enumerate() {
                *lanes = S::load(sums.as_ptr().add(i * padded + first + v * LANES));
            }
        }
        let scales = E::token_scales::<S>(values.as_ptr().add(E::scales_at(padded, first / BLOCK)));
        for (offset, token) in within.enumerate() {
            let at = (token * padded + first) * E::BYTES;
            let scale = E::splat::<S>(&scales, token);
            prefetch(next.as_ptr().wrapping_add(at));
            let mut value = [S::splat(0.0); VECTORS];
            for (v, value) in value.iter_mut().enumerate() {
                *value = E::load::<S>(values.as_ptr().add(at + v * LANES * E::BYTES), scale);
            }
            for (i, lanes) in lanes.iter_mut().enumerate() {
                let weight = S::splat(*weights.get_unchecked(i).get_unchecked(slot + offset));
                for (lanes, value) in lanes.iter_mut().zip(value) {
                    *lanes = S::fma(value, weight, *lanes);
                }
            }
        }
        for (i, lanes) in lanes.into_iter().enumerate() {
            for (v, lanes) in lanes.into_iter().enumerate() {
                S::store(sums.as_mut_ptr().add(i * padded + first + v * LANES), lanes);
            }
        }
    }
}
