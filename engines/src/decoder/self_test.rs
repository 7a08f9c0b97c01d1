//! The self-test of a backend: a tiny model with known numbers, computed on the backend and in plain loops.
//!
//! A driver that was updated, or a device that was reset, may compute wrong numbers without an error. The model has a
//! dense layer and a mixture of experts, weights of several types, and a prompt of two sequences followed by one more
//! token of each.

use super::load::{LayerWeights, ShardWeights};
use super::{Loaded, bad_step};
use crate::arithmetic;
use crate::backend::{
    AttentionWeights, Backend, FeedForwardWeights, LayerState, LinearData, MatrixShape, MixerWeights, Norm, Router,
    TensorData,
};
use crate::engine::{
    ActivationBits, Incarnation, Input, KvElement, OutputRows, Row, RowQuery, SeqId, ShardSpec, Step, StepId,
    TensorRank,
};
use crate::error::EngineError;
use crate::format::{ElementType, TensorBytes};
use crate::model::{
    Activation, Architecture, Attention, Experts, FeedForward, Layer, NormPlacement, Pairing, Rope, Weighting,
};
use crate::reference::ReferenceBackend;
use half::f16;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

const HIDDEN: usize = 96;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 32;
const WIDTH: usize = 160;
const EXPERTS: usize = 4;
const VOCABULARY: usize = 64;
/// The tokens of the two sequences' prompts.
const PROMPTS: [&[u32]; 2] = [&[3, 17, 40, 8, 63], &[21, 0, 5]];
/// The largest difference of a backend with another arithmetic, relative to the largest logit.
const TOLERANCE: f32 = 0.02;

/// The logits of the reference, which no backend changes.
static EXPECTED: LazyLock<Result<Vec<f32>, EngineError>> =
    LazyLock::new(|| logits(&mut ReferenceBackend::default()).map(|(expected, _)| expected));

/// Compares the backend with the reference, and returns the time of its last step.
pub(super) fn run<B: Backend>(backend: &mut B) -> Result<Duration, EngineError> {
    let expected = EXPECTED.as_ref().map_err(Clone::clone)?;
    let (got, step) = logits(backend)?;
    let largest = expected.iter().fold(0.0_f32, |largest, logit| largest.max(logit.abs()));
    let is_exact = backend.fingerprint() == arithmetic::fingerprint(ActivationBits::Sixteen);
    let limit = if is_exact { 0.0 } else { largest * TOLERANCE };
    let is_right = |(got, expected): (&f32, &f32)| (got - expected).abs() <= limit;
    match got.len() == expected.len() && got.iter().zip(expected).all(is_right) {
        true => Ok(step),
        false => Err(EngineError::SelfTest { what: "a small model with known numbers has other logits".to_owned() }),
    }
}

/// The logits of all rows of the tiny model, and the time of its last step.
fn logits<B: Backend>(backend: &mut B) -> Result<(Vec<f32>, Duration), EngineError> {
    let spec = spec();
    backend.set_activations(spec.activations)?;
    let weights = Numbers(0x9e37_79b9_7f4a_7c15).weights(backend, &spec.architecture)?;
    let states: Vec<_> =
        spec.architecture.layers.iter().map(|layer| LayerState::KeysAndValues(&layer.attention)).collect();
    let cache = backend.cache(&states, spec.kv_element, spec.kv_pages)?;
    let mut loaded = Loaded::new(spec, weights, cache, 0);
    let mut values = Vec::new();
    let row =
        |seq: usize, position: usize| Row { seq: SeqId(seq as u64), position: position as u32, wants_logits: true };
    let prompts = PROMPTS.iter().enumerate();
    let prompt_rows: Vec<Row> =
        prompts.flat_map(|(seq, tokens)| (0..tokens.len()).map(move |position| row(seq, position))).collect();
    let next_rows: Vec<Row> = PROMPTS.iter().enumerate().map(|(seq, tokens)| row(seq, tokens.len())).collect();
    let mut elapsed = Duration::ZERO;
    for (rows, tokens) in [(prompt_rows, PROMPTS.concat()), (next_rows, vec![30, 44])] {
        let incarnation = Incarnation { epoch: 0, owner: [0; 32] };
        let queries = vec![RowQuery::Logits; rows.len()];
        let step = Step { incarnation, id: StepId(0), operations: Vec::new(), rows };
        let started = Instant::now();
        match loaded.forward(backend, &step, Input::Tokens(tokens), &queries)?.rows {
            OutputRows::Scores(scores) => values.extend(scores.values),
            OutputRows::Hidden(_) => return Err(bad_step("the self-test gave hidden rows".to_owned())),
        }
        elapsed = started.elapsed();
    }
    Ok((values, elapsed))
}

fn spec() -> ShardSpec {
    let attention = Attention {
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        scale: (HEAD_DIM as f32).sqrt().recip(),
        softcap: None,
        window: None,
        rope: 0,
        query_key_norm: None,
        input_bias: true,
        output_bias: false,
        sinks: false,
    };
    let experts = Experts { count: EXPERTS, used: 2, weighting: Weighting::AmongChosen, router_bias: false };
    let layer = |experts: Option<Experts>| Layer {
        norms: NormPlacement::Before,
        attention: attention.clone(),
        feed_forward: FeedForward { width: WIDTH, activation: Activation::Silu, bias: false, experts },
    };
    let frequencies = (0..HEAD_DIM / 2).map(|pair| 0.5_f32.powi(pair as i32)).collect();
    let architecture = Architecture {
        family: "self-test".to_owned(),
        vocabulary: VOCABULARY,
        hidden: HIDDEN,
        context_tokens: 64,
        embedding_scale: 1.0,
        norm_offset: 0.0,
        norm_epsilon: 1e-5,
        logit_softcap: None,
        ropes: vec![Rope { pairing: Pairing::Halves, frequencies, magnitude: 1.0 }],
        long_ropes: None,
        layers: vec![layer(None), layer(Some(experts))],
    };
    ShardSpec {
        layers: 0..architecture.layers.len(),
        architecture,
        tensor: TensorRank::WHOLE,
        kv_element: KvElement::F16,
        activations: ActivationBits::Sixteen,
        kv_pages: 4,
    }
}

/// A sequence of numbers that is the same everywhere (xorshift64, Marsaglia 2003).
struct Numbers(u64);

impl Numbers {
    fn byte(&mut self) -> u8 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u8
    }

    /// A number from −0.25 to 0.25.
    fn small(&mut self) -> f32 {
        f32::from(self.byte() as i8) / 512.0
    }

    fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.small()).collect()
    }

    fn matrix(&mut self, element: ElementType, rows: usize, columns: usize) -> TensorData<'static> {
        let mut bytes = Vec::new();
        for _ in 0..rows * columns / 32 {
            match element {
                ElementType::Q8_0 | ElementType::Q4_0 => {
                    let (scale, codes) = if element == ElementType::Q8_0 { (0.002, 32) } else { (0.03, 16) };
                    bytes.extend(f16::from_f32(scale).to_le_bytes());
                    bytes.extend((0..codes).map(|_| self.byte()));
                }
                _ => bytes.extend((0..32).flat_map(|_| f16::from_f32(self.small()).to_le_bytes())),
            }
        }
        TensorData { name: "self-test", element, rows, columns, bytes: TensorBytes::Gathered(bytes) }
    }

    /// Projections of equal type and width.
    fn linears<B: Backend>(
        &mut self,
        backend: &mut B,
        element: ElementType,
        rows: &[usize],
        columns: usize,
        bias: Bias,
    ) -> Result<B::Linears, EngineError> {
        let shapes: Vec<MatrixShape> = rows.iter().map(|&rows| MatrixShape { element, rows, columns }).collect();
        let mut parts = rows.iter().map(|&rows| {
            let weight = self.matrix(element, rows, columns);
            Ok(LinearData { weight, bias: (bias == Bias::Some).then(|| self.floats(rows)) })
        });
        backend.linears(&shapes, &mut parts)
    }

    fn norm<B: Backend>(&mut self, backend: &mut B, epsilon: f32) -> Result<Norm<B>, EngineError> {
        let weight = self.floats(HIDDEN).into_iter().map(|value| 1.0 + value).collect();
        Ok(Norm { weight: backend.vector(weight)?, epsilon })
    }

    fn weights<B: Backend>(&mut self, backend: &mut B, of: &Architecture) -> Result<ShardWeights<B>, EngineError> {
        let embedding = self.matrix(ElementType::F16, VOCABULARY, HIDDEN);
        let embedding = backend.matrix(&embedding)?;
        let mut layers = Vec::new();
        for layer in &of.layers {
            let heads = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM];
            let mixer = MixerWeights::Attention(AttentionWeights {
                spec: layer.attention.clone(),
                norm: Some(self.norm(backend, of.norm_epsilon)?),
                query_key_value: self.linears(backend, ElementType::Q8_0, &heads, HIDDEN, Bias::Some)?,
                query_norm: None,
                key_norm: None,
                sinks: None,
                output: self.linears(backend, ElementType::F16, &[HIDDEN], HEADS * HEAD_DIM, Bias::None)?,
            });
            let experts = layer.feed_forward.experts.as_ref();
            let count = experts.map_or(1, |experts| experts.count);
            let norm = Some(self.norm(backend, of.norm_epsilon)?);
            let router = match experts {
                None => None,
                Some(spec) => {
                    let linear = self.linears(backend, ElementType::F16, &[EXPERTS], HIDDEN, Bias::None)?;
                    Some(Router { spec: spec.clone(), linear })
                }
            };
            let gate_up = vec![WIDTH; 2 * count];
            let feed_forward = FeedForwardWeights {
                activation: layer.feed_forward.activation,
                norm,
                router,
                gate_up: self.linears(backend, ElementType::Q4_0, &gate_up, HIDDEN, Bias::None)?,
                down: self.linears(backend, ElementType::Q8_0, &vec![HIDDEN; count], WIDTH, Bias::None)?,
            };
            layers.push(LayerWeights { mixer, after_mixer: None, feed_forward, after_feed_forward: None });
        }
        let output_norm = Some(self.norm(backend, of.norm_epsilon)?);
        Ok(ShardWeights { embedding: Some(embedding), layers, output_norm, output: None })
    }
}

/// Whether projections have biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bias {
    Some,
    None,
}
