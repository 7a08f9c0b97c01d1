//! Micro-benchmarks of kernels, codecs and the scheduler: `cargo bench -p exo-benches --bench micro`.
//!
//! They show what a change does to one function. Figures for users come from the benches beside peers.

#![allow(clippy::expect_used)] // A bench that cannot go on says why.

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use exo_actors::core::context::Context;
use exo_actors::core::scheduler::{Limits, Request, Scheduler};
use exo_engines::backend::{Backend, Norm, TensorData};
use exo_engines::cpu::{CpuBackend, Tier};
use exo_engines::engine::{Row, SeqId};
use exo_engines::format::ElementType;
use exo_engines::format::TensorBytes;
use exo_engines::format::blocks::dequantise_row;
use exo_engines::sampler::{Sampled, Sampler, SamplerSpec, SamplingParams, TokenSampler};
use exo_net::{FrameReader, FrameWriter, Payload, WireType, wire};
use std::collections::BTreeSet;

fn main() {
    divan::main();
}

/// Rows and columns of the matrices, and values of a row.
const WIDTH: usize = 2048;
/// Tokens of a common vocabulary.
const VOCABULARY: usize = 131_072;

/// A matrix of zeros with `rows` rows: kernels take the same time for any values.
fn matrix(backend: &mut CpuBackend, element: ElementType, rows: usize) -> <CpuBackend as Backend>::Matrix {
    let bytes = vec![0; rows * element.row_bytes(WIDTH).expect("whole blocks")];
    let tensor = TensorData { name: "bench", element, rows, columns: WIDTH, bytes: TensorBytes::Gathered(bytes) };
    backend.matrix(&tensor).expect("a matrix")
}

/// Matrix types, each with one row as in decoding, and with many as in prefill.
const PRODUCTS: [(ElementType, usize); 8] = [
    (ElementType::Q4_0, 1),
    (ElementType::Q4_0, 64),
    (ElementType::Q4_K, 1),
    (ElementType::Q4_K, 64),
    (ElementType::Q8_0, 1),
    (ElementType::Q8_0, 64),
    (ElementType::F16, 1),
    (ElementType::F16, 64),
];

/// The product of some rows with a matrix, on one thread.
#[divan::bench(args = PRODUCTS)]
fn product(bencher: Bencher<'_, '_>, (element, rows): (ElementType, usize)) {
    let mut backend = CpuBackend::new(1, Tier::best()).expect("a backend");
    let head = matrix(&mut backend, element, WIDTH);
    let norm = Norm { weight: backend.vector(vec![1.0; WIDTH]).expect("a vector"), epsilon: 1e-5 };
    let values = vec![0.5; rows * WIDTH];
    let wanted: Vec<usize> = (0..rows).collect();
    let weight_bytes = CpuBackend::matrix_bytes(&head);
    bencher.counter(BytesCount::new(weight_bytes)).bench_local(|| {
        let hidden = backend.upload(values.clone(), WIDTH).expect("rows");
        backend.logits(&norm, &head, hidden, &wanted, None).expect("logits")
    });
}

/// A row of an embedding table as floats.
#[divan::bench(args = [ElementType::Q4_0, ElementType::Q4_K, ElementType::Q6_K, ElementType::IQ4_XS])]
fn dequantise(bencher: Bencher<'_, '_>, element: ElementType) {
    let row = vec![0x35; element.row_bytes(WIDTH).expect("whole blocks")];
    let mut out = vec![0.0; WIDTH];
    bencher.counter(ItemsCount::new(WIDTH)).bench_local(|| dequantise_row(element, black_box(&row), &mut out));
}

/// A token drawn from logits: greedy, and with all of the usual filters.
#[divan::bench(args = [false, true])]
fn sample(bencher: Bencher<'_, '_>, filtered: bool) {
    let params = match filtered {
        true => SamplingParams { temperature: 0.8, top_k: 40, top_p: 0.95, min_p: 0.05, ..SamplingParams::default() },
        false => SamplingParams { temperature: 0.0, ..SamplingParams::default() },
    };
    let mut random = fastrand::Rng::with_seed(1);
    let logits: Vec<f32> = (0..VOCABULARY).map(|_| random.f32() * 20.0 - 10.0).collect();
    let mut sampler = TokenSampler::default();
    sampler.open(SeqId(1), SamplerSpec { params, prompt: vec![1], generated: Vec::new() });
    let mut position = 0;
    bencher.counter(ItemsCount::new(VOCABULARY)).bench_local(|| {
        position += 1;
        sampler.sample(SeqId(1), position, &logits).expect("a token")
    });
}

/// A frame's header: the rows of a step.
fn rows(count: u32) -> Vec<Row> {
    (0..count).map(|seq| Row { seq: SeqId(u64::from(seq)), position: 700, wants_logits: true }).collect()
}

/// A header of 64 rows as bytes.
#[divan::bench]
fn encode_header(bencher: Bencher<'_, '_>) {
    let rows = rows(64);
    bencher.bench_local(|| wire::encode(black_box(&rows)).expect("it is short"));
}

/// A header of 64 rows from bytes.
#[divan::bench]
fn decode_header(bencher: Bencher<'_, '_>) {
    let bytes = wire::encode(&rows(64)).expect("it is short");
    bencher.bench_local(|| wire::decode::<Vec<Row>>(black_box(&bytes)).expect("rows"));
}

/// A frame of one row of activations, written and read again, without a network.
#[divan::bench(args = [WireType::F32, WireType::F16])]
fn frame(bencher: Bencher<'_, '_>, wire_type: WireType) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let (header, numbers) = (rows(1), vec![0.5_f32; WIDTH]);
    bencher.counter(ItemsCount::new(WIDTH)).bench_local(|| {
        runtime.block_on(async {
            let mut bytes = Vec::new();
            let payload = Payload::Numbers(&numbers, wire_type);
            FrameWriter::new(&mut bytes).send(&header, payload).await.expect("it is written");
            FrameReader::new(bytes.as_slice()).receive::<Vec<Row>>(|_, _| Ok(())).await.expect("it is read")
        })
    });
}

/// One step of `sequences` sequences that decode: the plan, and its results.
#[divan::bench(args = [1, 16, 64])]
fn schedule(bencher: Bencher<'_, '_>, sequences: u64) {
    let context_tokens = 4096;
    let scheduler = || {
        let mut scheduler = Scheduler::new(Limits {
            pages: 64 * 128,
            context: Context::largest(Some(context_tokens), context_tokens, None),
            vocabulary: VOCABULARY as u32,
            steps_in_flight: 1,
            running: 64,
            rows_alone: 512,
            rows_shared: 128,
            draft_rows: 16,
            has_lookup: false,
            has_draft_model: false,
        });
        for seq in 0..sequences {
            let prompt = vec![seq as u32; 8];
            let params = SamplingParams::default();
            let sampler = SamplerSpec { params, prompt, generated: Vec::new() };
            let request = Request { seq: SeqId(seq), sampler, max_tokens: 4000, ends: BTreeSet::new() };
            scheduler.handle_request(request).expect("it fits");
        }
        // The prompts are computed in the first steps.
        (0..16).for_each(|_| step(&mut scheduler));
        scheduler
    };
    bencher.counter(ItemsCount::new(sequences)).with_inputs(scheduler).bench_local_refs(step);
}

/// A step whose rows each draw the token 7.
fn step(scheduler: &mut Scheduler) {
    let Some(plan) = scheduler.poll_step() else { return };
    let drawn = plan.rows.iter().filter(|row| row.wants_logits);
    let results = drawn.map(|row| (row.seq, Ok(Sampled { token: 7, logprob: 0.0, top_logprobs: Vec::new() })));
    scheduler.handle_step_done(results.collect());
    while let Some(event) = scheduler.poll_event() {
        black_box(event);
    }
}
