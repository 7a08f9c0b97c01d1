//! The CPU engine with failures at planned steps.

use exo_engines::cpu::CpuFactory;
use exo_engines::engine::*;
use exo_engines::model::WeightSource;
use exo_engines::{DeviceFault, Engine, EngineError};
use parking_lot::Mutex;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A factory whose engines fail at planned steps: odd steps panic, even steps return an error.
#[derive(Debug)]
pub(crate) struct Sabotaged {
    inner: CpuFactory,
    plan: Arc<Plan>,
}

#[derive(Debug)]
struct Plan {
    /// Steps so far, over all engines.
    steps: AtomicU64,
    /// Steps at which an engine fails, in descending order.
    failures: Mutex<Vec<u64>>,
}

impl Sabotaged {
    pub(crate) fn new(mut failures: Vec<u64>) -> Self {
        failures.reverse();
        let plan = Plan { steps: AtomicU64::new(0), failures: Mutex::new(failures) };
        Self { inner: CpuFactory::new(2), plan: Arc::new(plan) }
    }

    pub(crate) fn failures_left(&self) -> usize {
        self.plan.failures.lock().len()
    }
}

impl EngineFactory for Sabotaged {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn probe(&self) -> Vec<DeviceReport> {
        self.inner.probe()
    }

    fn open(&self, device: &DeviceId) -> Result<Box<dyn Engine>, EngineError> {
        Ok(Box::new(SabotagedEngine { inner: self.inner.open(device)?, plan: Arc::clone(&self.plan) }))
    }
}

struct SabotagedEngine {
    inner: Box<dyn Engine>,
    plan: Arc<Plan>,
}

impl Engine for SabotagedEngine {
    fn self_test(&mut self) -> Result<SelfTestReport, EngineError> {
        self.inner.self_test()
    }

    fn load(
        &mut self,
        shard: &ShardSpec,
        weights: &WeightSource,
        on: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<LoadReport, EngineError> {
        self.inner.load(shard, weights, on)
    }

    fn warm_up(&mut self) -> Result<WarmUpReport, EngineError> {
        self.inner.warm_up()
    }

    fn forward(&mut self, step: &Step, input: Input, queries: &[RowQuery]) -> Result<Output, EngineError> {
        let number = self.plan.steps.fetch_add(1, Ordering::Relaxed);
        let fails = {
            let mut failures = self.plan.failures.lock();
            let fails = failures.last().is_some_and(|&at| at <= number);
            if fails {
                failures.pop();
            }
            fails
        };
        // A panic comes before the step is computed, an error after it, and the result is lost.
        assert!(!fails || number.is_multiple_of(2), "planned");
        let output = self.inner.forward(step, input, queries)?;
        match fails {
            true => Err(EngineError::Device {
                device: "cpu".to_owned(),
                fault: DeviceFault::Lost,
                what: "planned".to_owned(),
            }),
            false => Ok(output),
        }
    }

    fn logits(&mut self, row: usize) -> Result<Vec<f32>, EngineError> {
        self.inner.logits(row)
    }
}
