//! The probe of a device that has failed: a self-test in a fresh engine.

use super::killer::Killer;
use exo_engines::EngineError;
use exo_engines::engine::{DeviceId, EngineFactory, SelfTestReport};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

/// A probe that runs.
#[derive(Debug)]
pub(super) struct Probe {
    pub(super) killer: Killer,
    pub(super) started: Instant,
    /// Whether the result does not count any more.
    pub(super) is_given_up: bool,
}

/// Starts a thread that opens an engine on the device, and tests it.
///
/// # Errors
/// The operating system's error if it cannot start a thread.
pub(super) fn start(
    factory: Arc<dyn EngineFactory>,
    device: DeviceId,
    on: impl FnOnce(Result<SelfTestReport, EngineError>) + Send + 'static,
) -> std::io::Result<Probe> {
    let killer = Killer::default();
    let probe = Probe { killer: killer.clone(), started: Instant::now(), is_given_up: false };
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
