//! R6.1–R6.5: the layers of a step allocate no memory once a step of the same size has run.

use crate::fixture;
use crate::pipeline::{Pipeline, SEQ, row};
use exo_engines::cpu::CpuFactory;
use exo_engines::engine::{ActivationBits, KvElement};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, which counts.
struct Counting;

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller upholds the contract of `GlobalAlloc`; so below.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// The allocations of each of the steps that compute `tokens` in rows of `step_rows`, the first layers only.
fn allocations(
    family: &str,
    layers: usize,
    threads: usize,
    activations: ActivationBits,
    step_rows: usize,
) -> Vec<usize> {
    let model = fixture(family).model;
    let factory = CpuFactory::new(threads);
    let mut pipeline = Pipeline::first_layers(&model, &factory, layers, KvElement::F16, activations);
    let tokens: Vec<u32> = (0..96).collect();
    let steps = tokens.chunks(step_rows).enumerate().map(|(index, tokens)| {
        let rows: Vec<_> = (0..tokens.len()).map(|i| row(SEQ, index * step_rows + i)).collect();
        let tokens = tokens.to_vec();
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        pipeline.hidden(&rows, tokens);
        ALLOCATIONS.load(Ordering::Relaxed) - before
    });
    steps.collect()
}

/// A step of two layers allocates as often as one of one layer: its batch and its result, but nothing in the layers.
/// This counts the allocations of the whole process, so it needs one of its own, as nextest gives it.
#[test]
fn layers_allocate_nothing() {
    for family in ["llama", "gemma3", "qwen2"] {
        for (threads, bits, step_rows) in
            [(1, ActivationBits::Sixteen, 1), (2, ActivationBits::Eight, 1), (2, ActivationBits::Sixteen, 8)]
        {
            let of = |layers: usize| allocations(family, layers, threads, bits, step_rows);
            let (one, two) = (of(1), of(2));
            // The first steps create the buffers; and now and then a page begins.
            let settled = |counts: &[usize]| counts[counts.len() / 2..].iter().min().copied();
            assert_eq!(settled(&one), settled(&two), "{family}: {one:?} and {two:?}");
            assert!(settled(&one).is_some_and(|count| count > 0 && count < 40), "{family}: {one:?}");
        }
    }
}
