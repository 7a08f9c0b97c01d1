//! The probe of a device that has failed: a self-test in a fresh engine.

use super::killer::Killer;
use crate::transport::callback::EventCallback;
use exo_engines::EngineError;
use exo_engines::engine::{DeviceId, EngineFactory, SelfTestReport};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// The result of a probe.
pub(crate) type ProbeOutcome = Result<SelfTestReport, EngineError>;

/// A probe that runs.
#[derive(Debug)]
pub(super) struct Probe {
    /// The number of the probe on its device.
    pub(super) number: u64,
    pub(super) killer: Killer,
    /// Receives the result.
    pub(super) report: EventCallback<ProbeOutcome>,
    /// Whether the result does not count any more.
    pub(super) is_given_up: bool,
}

/// Starts a thread that opens an engine on the device, tests it, and calls `on` with the result.
///
/// # Errors
/// The operating system's error if it cannot start a thread.
pub(super) fn start(
    factory: Arc<dyn EngineFactory>,
    device: DeviceId,
    number: u64,
    report: EventCallback<ProbeOutcome>,
    on: impl FnOnce(ProbeOutcome) + Send + 'static,
) -> std::io::Result<Probe> {
    let killer = Killer::default();
    let probe = Probe { number, killer: killer.clone(), report, is_given_up: false };
    let span = tracing::info_span!("probe", %device);
    std::thread::Builder::new().name("device-probe".to_owned()).spawn(move || {
        let _entered = span.entered();
        let tested = catch_unwind(AssertUnwindSafe(|| {
            let mut engine = factory.open(&device)?;
            killer.opened(engine.process());
            engine.self_test()
        }));
        on(tested.unwrap_or_else(|panic| Err(EngineError::of_panic(&*panic))));
    })?;
    Ok(probe)
}
