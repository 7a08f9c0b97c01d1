//! The choice of experts for a row.
//!
//! Routing depends on the row's own router logits only: the backend and the other rows of the batch change nothing.

use crate::arithmetic::functions::exp;
use crate::model::{Experts, Weighting};

/// An expert chosen for a row, and the weight of its output.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RoutedExpert {
    /// The number of the expert, from 0.
    pub expert: usize,
    /// The factor of the expert's output, 0 to 1.
    pub weight: f32,
}

/// Returns the `spec.used` experts of a row, best first; among equals, the lower number first. `logits` has one router
/// logit for each expert. A NaN counts as −∞.
pub fn route(spec: &Experts, logits: &[f32]) -> Vec<RoutedExpert> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // The addition turns −0 into 0, so that they are equal.
    let key = |expert: usize| if logits[expert].is_nan() { f32::NEG_INFINITY } else { logits[expert] + 0.0 };
    order.sort_by(|&a, &b| key(b).total_cmp(&key(a)).then(a.cmp(&b)));
    let chosen = &order[..spec.used.min(order.len())];
    let Some(&best) = chosen.first() else { return Vec::new() };
    let odds = |expert: usize| exp(logits[expert] - logits[best]);
    let sum: f32 = match spec.weighting {
        Weighting::AmongChosen => chosen.iter().map(|&expert| odds(expert)).sum(),
        Weighting::AmongAll => order.iter().map(|&expert| odds(expert)).sum(),
    };
    chosen.iter().map(|&expert| RoutedExpert { expert, weight: odds(expert) / sum }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(weighting: Weighting) -> Experts {
        Experts { count: 4, used: 2, weighting, router_bias: false }
    }

    #[test]
    fn the_best_experts_are_chosen_and_their_weights_sum_to_one() {
        let choices = route(&spec(Weighting::AmongChosen), &[0.0, 3.0_f32.ln(), -1.0, 0.0]);
        assert_eq!(choices.iter().map(|c| c.expert).collect::<Vec<_>>(), [1, 0]);
        assert!((choices[0].weight - 0.75).abs() < 1e-6 && (choices[1].weight - 0.25).abs() < 1e-6);
    }

    #[test]
    fn zeros_of_both_signs_are_equal() {
        let experts = |logits: &[f32]| route(&spec(Weighting::AmongChosen), logits).iter().map(|c| c.expert).collect();
        let chosen: Vec<usize> = experts(&[-1.0, -0.0, 0.0, f32::NAN]);
        assert_eq!(chosen, [1, 2]);
    }

    #[test]
    fn weighting_over_all_experts_counts_the_unchosen() {
        let choices = route(&spec(Weighting::AmongAll), &[0.0; 4]);
        assert_eq!(choices, [RoutedExpert { expert: 0, weight: 0.25 }, RoutedExpert { expert: 1, weight: 0.25 }]);
    }

    #[test]
    fn large_logits_do_not_overflow() {
        let choices = route(&spec(Weighting::AmongAll), &[1e4, -1e4, 1e4, 0.0]);
        assert!(choices.iter().all(|c| (c.weight - 0.5).abs() < 1e-6), "{choices:?}");
    }
}
