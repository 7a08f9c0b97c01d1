//! RMS norms.

use super::functions::tree_sum;

/// Chains of a sum of squares: enough to hide the latency of a fused multiply-add.
const CHAINS: usize = 64;

/// Σ x²: column c belongs to chain c mod 64. Each chain is fused, in order of columns; a tree joins the chains.
#[inline(always)]
pub fn sum_of_squares(values: &[f32]) -> f32 {
    let mut chains = [0.0_f32; CHAINS];
    let (whole, rest) = values.as_chunks::<CHAINS>();
    for chunk in whole {
        for (chain, &value) in chains.iter_mut().zip(chunk) {
            *chain = value.mul_add(value, *chain);
        }
    }
    for (chain, &value) in chains.iter_mut().zip(rest) {
        *chain = value.mul_add(value, *chain);
    }
    tree_sum(chains)
}

/// RMS normalisation: out = (x · f) · weight with f = 1 / √(Σ x² / n + epsilon).
#[inline(always)]
pub fn rms_norm(values: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let mean = sum_of_squares(values) / values.len() as f32;
    let factor = 1.0 / (mean + epsilon).sqrt();
    for ((out, &value), &weight) in out.iter_mut().zip(values).zip(weight) {
        *out = value * factor * weight;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_norm_is_close_to_f64() {
        let values: Vec<f32> = (0..150).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let weight: Vec<f32> = (0..150).map(|i| 1.0 + i as f32 / 100.0).collect();
        let mut out = vec![0.0; 150];
        rms_norm(&values, &weight, 1e-5, &mut out);
        let mean = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / 150.0;
        for i in 0..150 {
            let expected = f64::from(values[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
            assert!(
                (f64::from(out[i]) - expected).abs() < 1e-6 * expected.abs().max(1.0),
                "{i}: {} {expected}",
                out[i]
            );
        }
    }
}
