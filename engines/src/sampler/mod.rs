//! Sampling: turns a row of logits into a token.
//!
//! ```text
//! logits ─► penalties, bias ─► temperature ─► top-k ─► top-p ─► min-p ─► one draw ─► token
//!    └► log-probabilities of the unchanged logits
//! ```
//! A few logits of a row decide most draws ([`Sampler::query`]); the others need all. The token is the same.
//!
//! The random number of a draw depends only on (seed, position), so a replay of the same prefix draws the same tokens.

mod params;
mod philox;
mod top;

pub use params::{ParamsError, SamplingParams};

use crate::engine::{RowQuery, SeqId, TopLogits, TopQuery};
use crate::logits;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// The sampling state of a sequence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplerSpec {
    /// The request's sampling parameters.
    pub params: SamplingParams,
    /// Tokens of the prompt, for the repetition penalty.
    pub prompt: Vec<u32>,
    /// Tokens generated so far; not empty if a sequence is replayed.
    pub generated: Vec<u32>,
}

/// A sampled token and its log-probability.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampled {
    /// The token's id, below the length of the logits.
    pub token: u32,
    /// Natural logarithm of the token's probability, before any penalty or temperature: at most 0 but for rounding.
    pub logprob: f32,
    /// The likeliest tokens as (id, natural log-probability), best first: [`SamplingParams::top_logprobs`] of them, or
    /// the whole vocabulary if it has fewer.
    pub top_logprobs: Vec<(u32, f32)>,
}

/// The reason why no token could be drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum SampleError {
    /// The sequence has no open sampler.
    #[error("sequence {} has no open sampler", .0.0)]
    NotOpen(SeqId),
    /// The sequence's logits have no finite maximum.
    #[error("the logits of sequence {} have no finite maximum", .0.0)]
    NotANumber(SeqId),
    /// The sampled token is outside the model's vocabulary.
    #[error("the token {token} sampled for sequence {} is not in the model's vocabulary", .seq.0)]
    NoSuchToken {
        /// The sequence.
        seq: SeqId,
        /// The sampled token's id.
        token: u32,
    },
}

/// Draws tokens from the logits of the last shard.
pub trait Sampler: Send {
    /// Opens the sampler of `seq`, or replaces an open one.
    fn open(&mut self, seq: SeqId, spec: SamplerSpec);

    /// Closes the sampler of `seq`. Does nothing if none is open.
    fn close(&mut self, seq: SeqId);

    /// Returns the logits that the next draw of `seq` needs, after the tokens `ahead` were drawn, too. Tokens are below
    /// `vocabulary`.
    fn query(&self, seq: SeqId, ahead: &[u32], vocabulary: usize) -> RowQuery;

    /// Draws from the answer to `query`, as [`Sampler::sample`] does from all logits; `None`: all logits are needed.
    ///
    /// # Errors
    /// As [`Sampler::sample`].
    fn sample_top(
        &mut self,
        seq: SeqId,
        position: u32,
        query: &TopQuery,
        top: &TopLogits,
    ) -> Result<Option<Sampled>, SampleError>;

    /// Draws the token that follows `position`, the position of the row that gave `logits`: `[vocabulary]`. Positions
    /// count tokens of the sequence from 0.
    ///
    /// # Errors
    /// [`SampleError`] if `seq` has no open sampler, or its logits have no finite maximum.
    fn sample(&mut self, seq: SeqId, position: u32, logits: &[f32]) -> Result<Sampled, SampleError>;
}

/// The standard sampler.
#[derive(Debug, Default)]
pub struct TokenSampler {
    open: BTreeMap<SeqId, OpenSampler>,
}

#[derive(Debug)]
struct OpenSampler {
    params: SamplingParams,
    /// The number of times that each token was generated.
    generated: HashMap<u32, u32>,
    /// All tokens of the prompt and the answer.
    seen: HashSet<u32>,
}

impl Sampler for TokenSampler {
    fn open(&mut self, seq: SeqId, spec: SamplerSpec) {
        let mut open =
            OpenSampler { params: spec.params, generated: HashMap::new(), seen: spec.prompt.into_iter().collect() };
        spec.generated.into_iter().for_each(|token| open.note(token));
        self.open.insert(seq, open);
    }

    fn close(&mut self, seq: SeqId) {
        self.open.remove(&seq);
    }

    fn query(&self, seq: SeqId, ahead: &[u32], vocabulary: usize) -> RowQuery {
        // The draw of a sequence that is not open reports that.
        self.open.get(&seq).map_or(RowQuery::Logits, |open| open.query(ahead, vocabulary))
    }

    fn sample_top(
        &mut self,
        seq: SeqId,
        position: u32,
        query: &TopQuery,
        top: &TopLogits,
    ) -> Result<Option<Sampled>, SampleError> {
        let open = self.open.get_mut(&seq).ok_or(SampleError::NotOpen(seq))?;
        if top.best.is_empty() {
            return Err(SampleError::NotANumber(seq));
        }
        let sampled = open.draw_top(position, query, top);
        if let Some(sampled) = &sampled {
            open.note(sampled.token);
        }
        Ok(sampled)
    }

    fn sample(&mut self, seq: SeqId, position: u32, logits: &[f32]) -> Result<Sampled, SampleError> {
        let open = self.open.get_mut(&seq).ok_or(SampleError::NotOpen(seq))?;
        let sampled = open.draw(position, logits).ok_or(SampleError::NotANumber(seq))?;
        open.note(sampled.token);
        Ok(sampled)
    }
}

impl OpenSampler {
    fn note(&mut self, token: u32) {
        *self.generated.entry(token).or_default() += 1;
        self.seen.insert(token);
    }

    fn draw(&self, position: u32, logits: &[f32]) -> Option<Sampled> {
        let params = &self.params;
        let best = logits::largest(logits)?;
        let token = if params.changes_logits() {
            let changed = self.changed(logits);
            self.choose(position, &changed, logits::largest(&changed)?)?
        } else {
            self.choose(position, logits, best)?
        };
        let log_total = logits::log_total(logits, best.1);
        let logprob = |id: u32| (f64::from(logits[id as usize]) - log_total) as f32;
        let top =
            if params.top_logprobs > 0 { logits::likeliest(logits, params.top_logprobs as usize) } else { Vec::new() };
        Some(Sampled {
            token,
            logprob: logprob(token),
            top_logprobs: top.into_iter().map(|id| (id, logprob(id))).collect(),
        })
    }

    /// Returns the logits after penalties and bias.
    fn changed(&self, logits: &[f32]) -> Vec<f32> {
        let mut changed = logits.to_vec();
        for token in self.changed_tokens() {
            if let Some(logit) = changed.get_mut(token as usize) {
                *logit = self.change(token, *logit);
            }
        }
        changed
    }

    /// Returns the tokens whose logits penalties and bias change.
    fn changed_tokens(&self) -> BTreeSet<u32> {
        let params = &self.params;
        let mut tokens: BTreeSet<u32> = params.logit_bias.keys().copied().collect();
        if params.repetition_penalty != 1.0 {
            tokens.extend(&self.seen);
        }
        if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
            tokens.extend(self.generated.keys());
        }
        tokens
    }

    /// Returns the logit of a token after penalties and bias.
    ///
    /// The repetition penalty covers prompt and answer (Keskar et al. 2019, CTRL, §4.1). Presence and frequency
    /// penalties cover the answer, as OpenAI documents them.
    fn change(&self, token: u32, mut logit: f32) -> f32 {
        let params = &self.params;
        if params.repetition_penalty != 1.0 && self.seen.contains(&token) {
            let by = if logit > 0.0 { params.repetition_penalty.recip() } else { params.repetition_penalty };
            logit *= by;
        }
        if let Some(&count) = self.generated.get(&token) {
            logit -= params.presence_penalty + params.frequency_penalty * count as f32;
        }
        logit + params.logit_bias.get(&token).copied().unwrap_or(0.0)
    }

    /// Chooses the next token. `best` is the likeliest token, and `largest` its logit.
    fn choose(&self, position: u32, logits: &[f32], (best, largest): (u32, f32)) -> Option<u32> {
        let params = &self.params;
        if params.temperature == 0.0 {
            return Some(best);
        }
        let factor = self.factor();
        let share = philox::uniform(params.seed, u64::from(position));
        if params.top_k == 0 {
            let (weights, total) = logits::weights(logits, largest, factor);
            if params.top_p >= 1.0 && params.min_p == 0.0 {
                return logits::entry_at(&weights, share * total).map(|id| id as u32);
            }
            return self.cut(&weights, total).pick(share);
        }
        let order = logits::likeliest(logits, params.top_k as usize);
        let chosen: Vec<f32> = order.iter().map(|&id| logits[id as usize]).collect();
        let (weights, total) = logits::weights(&chosen, largest, factor);
        let candidates = Candidates { ids: order, weights };
        candidates.within(params.top_p, total).of_at_least(params.min_p).pick(share)
    }

    /// Returns the factor of the logits, for a temperature above 0. An infinite one would give the likeliest token no
    /// weight.
    fn factor(&self) -> f32 {
        self.params.temperature.recip().min(f32::MAX)
    }

    /// Applies top-p and min-p to all entries. `total` is the sum of the weights; the likeliest token has weight 1.
    fn cut(&self, weights: &[f32], total: f64) -> Candidates {
        let (top_p, min_p) = (f64::from(self.params.top_p), self.params.min_p);
        // All entries below this floor together weigh less than the part that top-p drops.
        let left_out = (1.0 - top_p) * total / weights.len() as f64;
        let mut kept = logits::at_least(weights, min_p.max(0.5 * left_out as f32));
        kept.sort_unstable_by(|(a, x), (b, y)| y.total_cmp(x).then(a.cmp(b)));
        let (ids, weights) = kept.into_iter().unzip();
        Candidates { ids, weights }.within(self.params.top_p, total)
    }
}

/// The tokens that can be drawn, likeliest first.
struct Candidates {
    ids: Vec<u32>,
    weights: Vec<f32>,
}

impl Candidates {
    /// Keeps the first candidates that together have the share `top_p` of `total`; keeps all if `top_p` is 1, whatever
    /// the rounding of the sums.
    fn within(mut self, top_p: f32, total: f64) -> Self {
        if top_p >= 1.0 {
            return self;
        }
        let (mut sum, mass) = (0.0, f64::from(top_p) * total);
        let last = self.weights.iter().position(|&weight| {
            sum += f64::from(weight);
            sum >= mass
        });
        self.truncate(last.map_or(self.ids.len(), |last| last + 1));
        self
    }

    fn of_at_least(mut self, weight: f32) -> Self {
        self.truncate(self.weights.partition_point(|&other| other >= weight));
        self
    }

    fn truncate(&mut self, count: usize) {
        self.ids.truncate(count);
        self.weights.truncate(count);
    }

    /// Returns the candidate at which the running sum of weights exceeds `share` of their total.
    fn pick(&self, share: f64) -> Option<u32> {
        let total: f64 = self.weights.iter().map(|&weight| f64::from(weight)).sum();
        logits::entry_at(&self.weights, share * total).map(|index| self.ids[index])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SEQ: SeqId = SeqId(1);

    fn sampler(params: SamplingParams) -> TokenSampler {
        let mut sampler = TokenSampler::default();
        let spec = SamplerSpec { params, prompt: vec![0], generated: Vec::new() };
        sampler.open(SEQ, spec);
        sampler
    }

    fn draws(params: &SamplingParams, logits: &[f32], count: u32) -> Vec<u32> {
        let mut sampler = sampler(params.clone());
        (0..count).map(|position| sampler.sample(SEQ, position, logits).expect("finite logits").token).collect()
    }

    #[test]
    fn greedy_takes_the_lowest_id_of_equal_logits() {
        assert_eq!(draws(&SamplingParams::greedy(), &[0.5, 2.0, 2.0, -1.0], 1), [1]);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let params = SamplingParams { temperature: 1.0, seed: 7, ..SamplingParams::greedy() };
        let logits = [1.0_f32.ln(), 2.0_f32.ln(), 5.0_f32.ln()];
        let drawn = draws(&params, &logits, 8000);
        for (id, share) in [(0, 0.125), (1, 0.25), (2, 0.625)] {
            let got = drawn.iter().filter(|&&token| token == id).count() as f64 / 8000.0;
            assert!((got - share).abs() < 0.02, "token {id}: {got}, not {share}");
        }
    }

    #[test]
    fn top_k_top_p_and_min_p_keep_only_their_tokens() {
        let logits = [0.0, 1.0, 2.0, 3.0];
        let base = SamplingParams { temperature: 1.0, ..SamplingParams::greedy() };
        let only = |params: SamplingParams| {
            let mut seen = draws(&params, &logits, 500);
            seen.sort_unstable();
            seen.dedup();
            seen
        };
        assert_eq!(only(SamplingParams { top_k: 2, ..base.clone() }), [2, 3]);
        // Probabilities are 0.03, 0.09, 0.24, 0.64.
        assert_eq!(only(SamplingParams { top_p: 0.8, ..base.clone() }), [2, 3]);
        assert_eq!(only(SamplingParams { min_p: 0.5, ..base.clone() }), [3]);
        assert_eq!(only(base), [0, 1, 2, 3]);
    }

    #[test]
    fn penalties_and_bias_change_the_choice_but_not_the_logprobs() {
        let params = SamplingParams { repetition_penalty: 4.0, top_logprobs: 2, ..SamplingParams::greedy() };
        // Token 0 is in the prompt.
        let sampled = sampler(params).sample(SEQ, 0, &[2.0, 1.0]).expect("finite logits");
        assert_eq!(sampled.token, 1);
        assert_eq!(sampled.top_logprobs[0].0, 0);
        assert!((sampled.logprob - -1.3133).abs() < 1e-3);
        let biased = SamplingParams { logit_bias: [(3, 100.0)].into(), ..SamplingParams::greedy() };
        assert_eq!(draws(&biased, &[5.0, 1.0, 1.0, 0.0], 1), [3]);
        let frequent = SamplingParams { frequency_penalty: 0.4, ..SamplingParams::greedy() };
        assert_eq!(draws(&frequent, &[1.0, 0.5], 4), [0, 0, 1, 0]);
    }

    #[test]
    fn logits_without_a_finite_maximum_are_an_error() {
        let mut greedy = sampler(SamplingParams::greedy());
        assert_eq!(greedy.sample(SEQ, 0, &[f32::NAN, f32::NAN]), Err(SampleError::NotANumber(SEQ)));
        assert_eq!(greedy.sample(SeqId(2), 0, &[1.0]), Err(SampleError::NotOpen(SeqId(2))));
    }

    proptest! {
        /// R6.1–R6.5: a sampler that is reopened with the tokens drawn so far continues with the same tokens.
        #[test]
        fn a_replay_draws_the_same_tokens(
            seed in any::<u64>(),
            temperature in 0.1_f32..2.0,
            cut in 1_usize..20,
            logits in prop::collection::vec(-5.0_f32..5.0, 30),
        ) {
            let params = SamplingParams {
                temperature, seed, repetition_penalty: 1.2, frequency_penalty: 0.3, top_p: 0.9,
                ..SamplingParams::greedy()
            };
            let whole = draws(&params, &logits, 20);
            let mut again = TokenSampler::default();
            let spec = SamplerSpec { params, prompt: vec![0], generated: whole[..cut].to_vec() };
            again.open(SEQ, spec);
            for (position, &token) in whole.iter().enumerate().skip(cut) {
                let sampled = again.sample(SEQ, position as u32, &logits);
                prop_assert_eq!(sampled.map(|s| s.token), Ok(token));
            }
        }
    }
}
