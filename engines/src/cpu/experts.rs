//! A mixture of experts: rows are sorted by expert, each expert computes its own rows, and only the weights of chosen
//! experts are read.
//!
//! ```text
//! norm ─► router ─► routes, by expert ─► gate, up ─► activation ─► down ─► each row: Σ weight · its experts' outputs
//! ```
//! An expert computes each row independently, and a row's sum follows the order of its own choices, so the other rows
//! of the batch change no bit.

use super::activation::Rows;
use super::kernels::{self, Operand};
use super::matmul::Product;
use super::{CpuBackend, product, rms_norm};
use crate::backend::{FeedForwardWeights, Linear, Router};
use crate::error::EngineError;
use crate::expert_routing;
use crate::model::Experts;
use crate::profile::Part;
use std::ops::Range;
use std::time::Instant;

/// Rows sorted by expert.
struct Routes {
    /// The original index of each sorted row. A row occurs once for each of its experts.
    rows: Vec<usize>,
    /// Each expert that has rows, with its range of sorted rows.
    groups: Vec<(usize, Range<usize>)>,
    /// For each original row, the sorted indices of its experts' outputs, and their weights.
    choices: Vec<Vec<(usize, f32)>>,
}

impl Routes {
    fn new(spec: &Experts, logits: &Rows) -> Self {
        let mut choices = Vec::with_capacity(logits.count());
        let mut sorted: Vec<(usize, usize, usize)> = Vec::new();
        for row in 0..logits.count() {
            let chosen = expert_routing::route(spec, logits.row(row));
            sorted.extend(chosen.iter().enumerate().map(|(slot, choice)| (choice.expert, row, slot)));
            choices.push(chosen.iter().map(|choice| (0, choice.weight)).collect::<Vec<_>>());
        }
        sorted.sort_unstable();
        let mut groups: Vec<(usize, Range<usize>)> = Vec::new();
        for (at, &(expert, row, slot)) in sorted.iter().enumerate() {
            choices[row][slot].0 = at;
            match groups.last_mut() {
                Some((last, range)) if *last == expert => range.end = at + 1,
                _ => groups.push((expert, at..at + 1)),
            }
        }
        Self { rows: sorted.into_iter().map(|(_, row, _)| row).collect(), groups, choices }
    }
}

impl CpuBackend {
    pub(super) fn mixture(
        &mut self,
        router: &Router<Self>,
        weights: &FeedForwardWeights<Self>,
        hidden: &Rows,
    ) -> Result<Rows, EngineError> {
        let Self { tier, pool, buffers, profile, .. } = self;
        let started = Instant::now();
        let normed = kernels::norm(*tier, pool, buffers, hidden, weights.norm.as_ref().map(rms_norm))?;
        profile.add(Part::Encoding, started);
        let input = normed.as_ref().unwrap_or(hidden);
        let [logits] = self.project(Part::Routing, Operand::Rows(input), &router.linear)?;
        let started = Instant::now();
        let routes = Routes::new(&router.spec, &logits);
        let mut sorted = self.buffers.rows(routes.rows.len(), input.width);
        for (to, &row) in sorted.values.chunks_mut(input.width).zip(&routes.rows) {
            to.copy_from_slice(input.row(row));
        }
        self.profile.add(Part::Routing, started);
        let [gate, up] = self.experts(Part::GateUp, &routes, Operand::Rows(&sorted), &weights.gate_up)?;
        let inner = Operand::Gated { activation: weights.activation, gate: &gate, up: &up };
        let [parts] = self.experts(Part::Down, &routes, inner, &weights.down)?;
        let started = Instant::now();
        let mut out = self.buffers.rows(hidden.count(), parts.width);
        kernels::combine(self.tier, &mut self.pool, &routes.choices, &parts, &mut out)?;
        self.profile.add(Part::Activation, started);
        [logits, sorted, gate, up, parts].into_iter().chain(normed).for_each(|rows| self.buffers.keep(rows));
        Ok(out)
    }

    /// Returns the products of each expert's rows of `operand` with the `N` projections of that expert.
    fn experts<const N: usize>(
        &mut self,
        part: Part,
        routes: &Routes,
        operand: Operand<'_>,
        linears: &[Linear<Self>],
    ) -> Result<[Rows; N], EngineError> {
        let (experts, _) = linears.as_chunks::<N>();
        let widths = experts.first().map_or([0; N], |expert| expert.each_ref().map(|linear| linear.weight.rows));
        let mut outs = widths.map(|width| self.buffers.rows(operand.rows().count(), width));
        {
            let mut products: Vec<Product<'_>> = Vec::with_capacity(N * routes.groups.len());
            let mut rest = outs.each_mut().map(|rows| rows.values.as_mut_slice());
            for (expert, rows) in &routes.groups {
                for (linear, rest) in experts[*expert].iter().zip(&mut rest) {
                    let (own, behind) = std::mem::take(rest).split_at_mut(rows.len() * linear.weight.rows);
                    *rest = behind;
                    products.push(product(linear, rows.clone(), own));
                }
            }
            self.multiply(part, operand, &mut products)?;
        }
        Ok(outs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, TensorData};
    use crate::format::{ElementType, TensorBytes};
    use crate::model::{Activation, Weighting};
    use crate::simd::Tier;

    const HIDDEN: usize = 32;
    const EXPERTS: usize = 8;

    /// A mixture whose experts 5, 6 and 7 return only non-finite values if they are read.
    fn mixture(backend: &mut CpuBackend) -> FeedForwardWeights<CpuBackend> {
        let mut linear = |rows: usize, value: &dyn Fn(usize) -> f32| {
            let bytes = (0..rows * HIDDEN).flat_map(|i| value(i).to_le_bytes()).collect();
            let bytes = TensorBytes::Gathered(bytes);
            let data = TensorData { name: "test", element: ElementType::F32, rows, columns: HIDDEN, bytes };
            Linear { weight: backend.matrix(&data).expect("finite weights"), bias: None, bytes: 0 }
        };
        // Row r of the input has a 1 at column r % 5, and so uses the experts r % 5 and (r % 5 + 1) % 5.
        let router = linear(EXPERTS, &|i| match (i / HIDDEN, i % HIDDEN) {
            (expert, column) if expert == column => 2.0,
            (expert, column) if expert < 5 && expert == (column + 1) % 5 => 1.0,
            (5.., _) => -9.0,
            _ => 0.0,
        });
        let mut weight = |expert: usize, salt: usize| {
            let value = move |i: usize| ((i * 7 + expert * 13 + salt) as f32 * 0.37).sin();
            linear(HIDDEN, &move |i| if expert < 5 { value(i) } else { f32::MAX })
        };
        let gate_up = (0..EXPERTS).flat_map(|expert| [1, 2].map(|salt| weight(expert, salt))).collect();
        let down = (0..EXPERTS).map(|expert| weight(expert, 3)).collect();
        let spec = Experts { count: EXPERTS, used: 2, weighting: Weighting::AmongChosen, router_bias: false };
        let router = Some(Router { spec, linear: vec![router] });
        FeedForwardWeights { activation: Activation::Silu, norm: None, router, gate_up, down }
    }

    fn input(rows: std::ops::Range<usize>) -> Rows {
        let values = rows.flat_map(|row| (0..HIDDEN).map(move |column| f32::from(u8::from(column == row % 5))));
        Rows { width: HIDDEN, values: values.collect() }
    }

    /// Experts that no row uses are not read, and a row's bits do not depend on the other rows.
    #[test]
    fn each_row_uses_only_its_own_experts() {
        let mut backend = CpuBackend::new(2, Tier::best()).expect("threads");
        let weights = mixture(&mut backend);
        let together = backend.feed_forward(&weights, &input(0..23)).expect("no panic");
        assert!(together.values.iter().all(|value| value.is_finite()), "an expert was read that no row uses");
        for row in 0..23 {
            let alone = backend.feed_forward(&weights, &input(row..row + 1)).expect("no panic");
            assert_eq!(alone.values, together.row(row), "row {row}");
        }
        assert_ne!(together.row(0), together.row(1));
        assert_eq!(together.row(0), together.row(5));
    }
}
