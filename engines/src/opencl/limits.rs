//! What a device does at most, measured: the reads of its memory, and the engine's own products.

use super::programs::KernelSet;
use super::queue::{Arg, integer};
use super::rows::OpenClBackend;
use crate::backend::{Backend, LinearData, MatrixShape, TensorData};
use crate::engine::DeviceRates;
use crate::error::EngineError;
use crate::format::{ElementType, TensorBytes};
use std::time::{Duration, Instant};

/// The bytes of a measured read: more than the caches of any device, less than its memory.
const READ_BYTES_MAX: u64 = 1 << 30;
/// The shape of the measured product: that of a projection of a model with 8 billion weights. As many rows as a chunk
/// of a prompt has are measured where a few take no longer than [`SLOW`].
const OUTPUTS: usize = 4096;
const COLUMNS: usize = 4096;
const FEW_ROWS: usize = 4;
const ROWS: usize = 256;
/// Work that takes longer is measured once.
const SLOW: Duration = Duration::from_millis(20);
/// Work that is measured at once takes about this long, and the fastest of some runs counts.
const MEASURED: Duration = Duration::from_millis(40);
const RUNS: usize = 5;
const LAUNCHES_MAX: usize = 64;

/// Measures a device. It takes about a second, on slow devices a few.
pub(super) fn measure(backend: &mut OpenClBackend) -> Result<DeviceRates, EngineError> {
    let read_bytes_per_s = Some(read_rate(backend)?);
    let multiplications_per_s = Some(product_rate(backend)?);
    Ok(DeviceRates { read_bytes_per_s, multiplications_per_s })
}

fn read_rate(backend: &mut OpenClBackend) -> Result<f64, EngineError> {
    let limits = *backend.queue.limits();
    let bytes = READ_BYTES_MAX.min(limits.buffer_max_bytes).min(limits.memory_bytes / 8) / 16 * 16;
    let buffer = backend.queue.allocate(usize::try_from(bytes).unwrap_or(usize::MAX), "a measurement")?;
    let out = backend.queue.allocate(size_of::<u32>(), "a measurement")?;
    let count = Arg::Unsigned(u32::try_from(bytes / 16).unwrap_or(u32::MAX));
    // Enough work-items for any device.
    let groups = ((bytes / 16 / 64).clamp(1, 8192) as usize, 1);
    backend.queue.run(KernelSet::Limits, "fill", &[Arg::of(&buffer), count], groups)?;
    let arguments = [Arg::of(&buffer), count, Arg::of(&out)];
    let once = fastest(backend, |backend| backend.queue.run(KernelSet::Limits, "read", &arguments, groups))?;
    Ok(bytes as f64 / once.as_secs_f64())
}

fn product_rate(backend: &mut OpenClBackend) -> Result<f64, EngineError> {
    let element = ElementType::Q4_0;
    let shape = MatrixShape { element, rows: OUTPUTS, columns: COLUMNS };
    let bytes = vec![0x42; OUTPUTS * element.row_bytes(COLUMNS).unwrap_or(0)];
    let bytes = TensorBytes::Gathered(bytes);
    let weight = TensorData { name: "a measurement", element, rows: OUTPUTS, columns: COLUMNS, bytes };
    let matrices = backend.linears(&[shape], &mut std::iter::once(Ok(LinearData { weight, bias: None })))?;
    let mut rate = |rows: usize| -> Result<(f64, Duration), EngineError> {
        let values = (0..rows * COLUMNS).map(|i| integer(i % 251) as f32 - 125.0).collect();
        let codes = backend.upload(values, COLUMNS)?;
        let codes = backend.encode(&codes)?;
        let once = fastest(backend, |backend| backend.product(&matrices, 0, &codes).map(drop))?;
        Ok(((OUTPUTS * COLUMNS * rows) as f64 / once.as_secs_f64(), once))
    };
    let (few, once) = rate(FEW_ROWS)?;
    if once > SLOW { Ok(few) } else { Ok(rate(ROWS)?.0) }
}

/// The time of `work` in the fastest of some runs.
fn fastest(
    backend: &mut OpenClBackend,
    mut work: impl FnMut(&mut OpenClBackend) -> Result<(), EngineError>,
) -> Result<Duration, EngineError> {
    let mut run = |backend: &mut OpenClBackend, launches: usize| -> Result<Duration, EngineError> {
        backend.queue.finish()?;
        let started = Instant::now();
        (0..launches).try_for_each(|_| work(backend))?;
        backend.queue.finish()?;
        Ok(started.elapsed() / launches as u32)
    };
    // The first run compiles the kernel.
    run(backend, 1)?;
    let once = run(backend, 1)?;
    if once > SLOW {
        return Ok(once);
    }
    let launches = (MEASURED.as_secs_f64() / once.as_secs_f64().max(1e-9)).ceil().clamp(1.0, LAUNCHES_MAX as f64);
    let mut least = once;
    for _ in 0..RUNS {
        least = least.min(run(backend, launches as usize)?);
    }
    Ok(least)
}

#[cfg(test)]
mod tests {
    use super::super::listing::{Family, find};
    use super::*;

    /// R1.3, R6.1–R6.5: what a device does at most is measured, and is possible.
    #[test]
    fn rates_are_measured() {
        for found in [Family::Intel, Family::OtherGpus, Family::CpuRuntimes].into_iter().flat_map(find) {
            let rates = measure(&mut OpenClBackend::new(&found).expect("it opens")).expect("measured");
            let read = rates.read_bytes_per_s.expect("known");
            let multiplied = rates.multiplications_per_s.expect("known");
            println!("{}: {:.1} GB/s, {:.1} G multiplications/s", found.report.name, read / 1e9, multiplied / 1e9);
            assert!((1e6..1e14).contains(&read) && (1e5..1e16).contains(&multiplied));
        }
    }
}
