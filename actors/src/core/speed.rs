//! The speed of a device or link, estimated from measurements that other work disturbs.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// The measurements that count: older ones were of a machine that may have changed.
const SAMPLES_MAX: usize = 9;
/// The least [`Speed::spread`] after one, two, three, … measurements: a few disturbed measurements can agree with each
/// other and still be wrong.
const SPREADS_MIN: [f64; 5] = [2.0, 1.7, 1.4, 1.25, 1.15];

/// A speed, and how certain it is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// The estimate, in bytes of weights per second of decoding.
    pub bytes_per_s: f64,
    /// The speed is likely between the estimate divided by this factor and the estimate times this factor. At least 1.
    pub spread: f64,
}

impl Speed {
    /// Whether the numbers are possible.
    pub fn is_plausible(&self) -> bool {
        self.bytes_per_s.is_finite() && self.bytes_per_s > 0.0 && self.spread.is_finite() && self.spread >= 1.0
    }
}

impl From<Median> for Speed {
    fn from(Median { value, spread }: Median) -> Self {
        Self { bytes_per_s: value, spread }
    }
}

/// The latest measurements of one quantity.
#[derive(Debug, Clone, Default)]
pub struct Estimate {
    samples: VecDeque<f64>,
}

/// The median of an estimate's measurements.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Median {
    /// The value, in the unit of the measurements.
    pub value: f64,
    /// The quantity is likely between the value divided by this factor and the value times this factor. At least 1.
    pub spread: f64,
}

impl Estimate {
    /// Adds a measurement.
    pub fn add(&mut self, sample: f64) {
        self.samples.push_back(sample);
        if self.samples.len() > SAMPLES_MAX {
            self.samples.pop_front();
        }
    }

    /// The median and its spread; `None` before the first measurement. From five measurements on, the slowest and the
    /// fastest do not count.
    pub fn median(&self) -> Option<Median> {
        let mut sorted: Vec<f64> = self.samples.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let median = *sorted.get(sorted.len() / 2)?;
        let cut = usize::from(sorted.len() >= SPREADS_MIN.len());
        let (slowest, fastest) = (sorted[cut], sorted[sorted.len() - 1 - cut]);
        let least = SPREADS_MIN[sorted.len().min(SPREADS_MIN.len()) - 1];
        let spread = (fastest / median).max(median / slowest).max(least);
        Some(Median { value: median, spread })
    }

    /// Whether the next measurements still make the estimate more certain by their number.
    pub fn is_early(&self) -> bool {
        self.samples.len() < SPREADS_MIN.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn median(samples: &[f64]) -> Option<(f64, f64)> {
        let mut estimate = Estimate::default();
        samples.iter().for_each(|&sample| estimate.add(sample));
        estimate.median().map(|median| (median.value, median.spread))
    }

    /// One disturbed measurement of many changes neither the estimate nor its certainty; two that contradict each other
    /// leave both open.
    #[test]
    fn a_disturbed_measurement_does_not_count() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[8e9]), Some((8e9, 2.0)));
        assert_eq!(median(&[0.5e9, 8e9]), Some((8e9, 16.0)));
        assert_eq!(median(&[8e9, 0.3e9, 8.1e9, 7.9e9, 8e9]), Some((8e9, 1.15)));
        assert_eq!(median(&[1.0; 20]), Some((1.0, 1.15)));
    }
}
