//! Draws from a row's largest logits, where these and the bound of the sums' error decide the token.
//!
//! All tokens that are not listed rank behind the last listed one. Penalties and bias change the logits of tokens that
//! the query names, so every changed logit is known, too.

use super::{Candidates, OpenSampler, Sampled, philox};
use crate::engine::{RowQuery, TopLogits, TopQuery};
use crate::logits;

/// The most logits of a query: finding more takes longer than passing all on.
const LISTED_MAX: usize = 256;
/// The logits that top-p and min-p ask for.
const NUCLEUS: usize = 64;
/// The relative error of totals: that of the engine's, and as much for the total over all logits, with which the result
/// must agree.
const ERROR: f64 = 2.0 * TopLogits::TOTAL_ERROR;

/// The relative error of a weight: e^x is not exactly monotonic.
const EXP_ERROR: f32 = 1e-6;

/// Tokens in the order of their logits after penalties and bias, best first; among equals, the lowest token first.
struct Ranked {
    tokens: Vec<(u32, f32)>,
    /// The number of first tokens that rank before all unlisted ones.
    certain: usize,
    /// The largest logit that an unlisted token can have; `None`: all tokens are listed.
    unlisted: Option<f32>,
}

impl OpenSampler {
    pub(super) fn query(&self, ahead: &[u32], vocabulary: usize) -> RowQuery {
        let params = &self.params;
        let kept = match (params.temperature == 0.0, params.top_k as usize) {
            (true, _) => 1,
            (false, 0) if params.top_p >= 1.0 && params.min_p == 0.0 => return RowQuery::Logits,
            (false, 0) => NUCLEUS,
            (false, top_k) => top_k,
        };
        let mut tokens = Vec::new();
        if params.changes_logits() {
            let mut changed = self.changed_tokens();
            changed.extend(ahead);
            tokens.extend(changed.into_iter().filter(|&token| (token as usize) < vocabulary));
        }
        // Each changed token may take a place in the list.
        let count = (kept.saturating_add(tokens.len())).max(params.top_logprobs as usize);
        if count > LISTED_MAX {
            return RowQuery::Logits;
        }
        let needs_total = params.temperature > 0.0 && params.top_k == 0 && params.top_p < 1.0;
        RowQuery::Top(TopQuery { count: count as u32, tokens, factor: needs_total.then(|| self.factor()) })
    }

    /// Draws the token that [`OpenSampler::draw`] draws from all logits; `None`: the listed ones do not decide it.
    pub(super) fn draw_top(&self, position: u32, query: &TopQuery, top: &TopLogits) -> Option<Sampled> {
        let ranked = self.ranked(query, top)?;
        let token = self.choose_top(position, query, top, &ranked)?;
        let listed = top.best.iter().copied().chain(query.tokens.iter().copied().zip(top.tokens.iter().copied()));
        let logit = listed.into_iter().find(|&(id, _)| id == token)?.1;
        let logprob = |logit: f32| (f64::from(logit) - top.log_total) as f32;
        let likeliest = top.best.iter().take(self.params.top_logprobs as usize);
        Some(Sampled {
            token,
            logprob: logprob(logit),
            top_logprobs: likeliest.map(|&(id, logit)| (id, logprob(logit))).collect(),
        })
    }

    fn ranked(&self, query: &TopQuery, top: &TopLogits) -> Option<Ranked> {
        let &(last_token, last) = top.best.last()?;
        let is_asked = |token: &u32| query.tokens.binary_search(token).is_ok();
        let mut tokens: Vec<(u32, f32)> = top.best.iter().filter(|(token, _)| !is_asked(token)).copied().collect();
        let changed = query.tokens.iter().zip(&top.tokens);
        tokens.extend(changed.map(|(&token, &logit)| (token, self.change(token, logit))));
        if tokens.iter().any(|(_, logit)| logit.is_nan()) {
            return None;
        }
        tokens.sort_unstable_by(|(a, x), (b, y)| (y + 0.0).total_cmp(&(x + 0.0)).then(a.cmp(b)));
        if top.best.len() < query.count as usize {
            return Some(Ranked { certain: tokens.len(), unlisted: None, tokens });
        }
        let is_certain = |&(token, logit): &(u32, f32)| logit > last || logit == last && token <= last_token;
        Some(Ranked { certain: tokens.partition_point(is_certain), unlisted: Some(last), tokens })
    }

    fn choose_top(&self, position: u32, query: &TopQuery, top: &TopLogits, ranked: &Ranked) -> Option<u32> {
        let params = &self.params;
        let certain = &ranked.tokens[..ranked.certain];
        let &(best, largest) = certain.first().filter(|(_, logit)| logit.is_finite())?;
        if params.temperature == 0.0 {
            return Some(best);
        }
        let share = philox::uniform(params.seed, u64::from(position));
        let weighed = |tokens: &[(u32, f32)]| {
            let (ids, logits): (Vec<u32>, Vec<f32>) = tokens.iter().copied().unzip();
            let (weights, total) = logits::weights(&logits, largest, self.factor());
            (Candidates { ids, weights }, total)
        };
        if params.top_k > 0 {
            let kept = params.top_k as usize;
            if certain.len() < kept && ranked.unlisted.is_some() {
                return None;
            }
            let (candidates, total) = weighed(&certain[..kept.min(certain.len())]);
            return candidates.within(params.top_p, total).of_at_least(params.min_p).pick(share);
        }
        let (candidates, _) = weighed(certain);
        let unlisted = ranked.unlisted.map(|logit| weighed(&[(0, logit)]).0.weights[0]);
        self.nucleus(candidates, unlisted, self.totals(query, top, largest))?.pick(share)
    }

    /// Returns bounds of Σ e^((logit − `largest`) · factor) over all logits after penalties and bias.
    fn totals(&self, query: &TopQuery, top: &TopLogits, largest: f32) -> (f64, f64) {
        let (Some(factor), Some(&(_, before))) = (query.factor, top.best.first()) else { return (0.0, 0.0) };
        let weight = |logit: f32| (f64::from(logit - largest) * f64::from(factor)).exp();
        let mut total = top.weight_total * weight(before);
        let mut slack = total * ERROR;
        for (&token, &logit) in query.tokens.iter().zip(&top.tokens) {
            let changed = weight(self.change(token, logit));
            let unchanged = if logit.is_nan() { 0.0 } else { weight(logit) };
            total += changed - unchanged;
            slack += (changed + unchanged) * ERROR;
        }
        (total - slack, total + slack)
    }

    /// Applies top-p and min-p as [`OpenSampler::cut`] does to all entries. `unlisted` is the largest weight that an
    /// unlisted token can have, and `totals` bounds the sum of all weights.
    fn nucleus(&self, mut candidates: Candidates, unlisted: Option<f32>, totals: (f64, f64)) -> Option<Candidates> {
        let (top_p, min_p) = (f64::from(self.params.top_p), self.params.min_p);
        // Weights beyond all bounds: a penalty or bias is large, and the temperature near 0.
        if top_p < 1.0 && !(totals.0.is_finite() && totals.1.is_finite()) {
            return None;
        }
        // Logits that differ can have equal weights, which are ordered by token.
        let mut order: Vec<(u32, f32)> = candidates.ids.into_iter().zip(candidates.weights).collect();
        order.sort_unstable_by(|(a, x), (b, y)| y.total_cmp(x).then(a.cmp(b)));
        (candidates.ids, candidates.weights) = order.into_iter().unzip();
        let candidates = candidates.of_at_least(min_p);
        let is_complete = unlisted.is_none_or(|weight| weight * (1.0 + EXP_ERROR) < min_p);
        let reaches = |mass: f64| {
            let mut sum = 0.0;
            candidates.weights.iter().position(|&weight| {
                sum += f64::from(weight);
                sum >= mass
            })
        };
        let last = if top_p >= 1.0 { None } else { reaches(top_p * totals.0) };
        if top_p < 1.0 && last != reaches(top_p * totals.1) {
            return None;
        }
        match last {
            Some(last) => {
                let is_certain = unlisted.is_none_or(|weight| candidates.weights[last] > weight * (1.0 + EXP_ERROR));
                let mut candidates = candidates;
                candidates.truncate(last + 1);
                is_certain.then_some(candidates)
            }
            None => is_complete.then_some(candidates),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::SeqId;
    use crate::sampler::Sampler;
    use crate::sampler::{SamplerSpec, SamplingParams, TokenSampler};
    use proptest::prelude::*;

    const SEQ: SeqId = SeqId(1);

    fn params() -> impl Strategy<Value = SamplingParams> {
        let logit = prop_oneof![-4.0_f32..4.0, Just(-100.0_f32), Just(100.0_f32)];
        let bias = prop::collection::btree_map(0_u32..300, logit, 0..4);
        let penalties = (prop::bool::ANY, prop::bool::ANY, prop::bool::ANY, bias);
        let cuts = (0_u32..40, prop_oneof![Just(1.0_f32), 0.05_f32..1.0], prop_oneof![Just(0.0_f32), 0.0_f32..0.5]);
        let temperature = prop_oneof![Just(0.0_f32), 0.1_f32..3.0, Just(0.001_f32), Just(0.01_f32)];
        (temperature, cuts, penalties, any::<u64>(), 0_u32..5).prop_map(|(temperature, cuts, penalties, seed, top)| {
            SamplingParams {
                temperature,
                top_k: cuts.0.saturating_sub(20),
                top_p: cuts.1,
                min_p: cuts.2,
                repetition_penalty: if penalties.0 { 1.3 } else { 1.0 },
                presence_penalty: if penalties.1 { 0.5 } else { 0.0 },
                frequency_penalty: if penalties.2 { 0.7 } else { 0.0 },
                logit_bias: penalties.3,
                seed,
                top_logprobs: top,
            }
        })
    }

    fn logits() -> impl Strategy<Value = Vec<f32>> {
        // Coarse values, so that some are equal.
        let logit = prop_oneof![20 => (-100_i32..100).prop_map(|n| n as f32 / 8.0), 1 => Just(f32::NAN)];
        prop::collection::vec(logit, 1..400)
    }

    fn open(params: &SamplingParams, prompt: &[u32], generated: &[u32]) -> TokenSampler {
        let mut sampler = TokenSampler::default();
        let (params, prompt, generated) = (params.clone(), prompt.to_vec(), generated.to_vec());
        sampler.open(SEQ, SamplerSpec { params, prompt, generated });
        sampler
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        /// R6.1–R6.5: what few logits decide is what all logits decide, to the bit, with other rounding of sums, too.
        #[test]
        fn few_logits_draw_what_all_draw(
            params in params(),
            logits in logits(),
            (prompt, generated) in (prop::collection::vec(0_u32..300, 0..9), prop::collection::vec(0_u32..300, 0..9)),
            error in -0.9e-5..0.9e-5_f64,
        ) {
            let expected = open(&params, &prompt, &generated).sample(SEQ, 7, &logits);
            let mut sampler = open(&params, &prompt, &generated);
            let RowQuery::Top(query) = sampler.query(SEQ, &[], logits.len()) else { return Ok(()) };
            let mut top = logits::top(&logits, &query);
            top.weight_total *= 1.0 + error;
            match sampler.sample_top(SEQ, 7, &query, &top) {
                Ok(None) => {}
                Ok(Some(sampled)) => prop_assert_eq!(Ok(sampled), expected),
                Err(error) => prop_assert_eq!(Err(error), expected),
            }
        }
    }

    /// Without penalties the likeliest token, and top-k, never need all logits.
    #[test]
    fn greedy_and_top_k_need_few_logits() {
        let logits: Vec<f32> = (0..5000_u32).map(|id| (id.wrapping_mul(2_654_435_761) >> 20) as f32 / 512.0).collect();
        for (temperature, top_k) in [(0.0, 0), (0.8, 40)] {
            let params = SamplingParams { temperature, top_k, top_p: 0.9, top_logprobs: 3, ..SamplingParams::greedy() };
            let mut sampler = open(&params, &[1], &[]);
            for position in 0..50 {
                let RowQuery::Top(query) = sampler.query(SEQ, &[], logits.len()) else { panic!("all are asked for") };
                let top = logits::top(&logits, &query);
                assert!(sampler.sample_top(SEQ, position, &query, &top).expect("finite").is_some(), "{params:?}");
            }
        }
    }
}
