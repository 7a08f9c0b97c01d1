//! What ends an engine that does not return.

use exo_engines::engine::EngineProcess;
use parking_lot::Mutex;
use std::sync::Arc;

/// Kills the process of an engine that another thread opens and uses.
#[derive(Debug, Clone, Default)]
pub(crate) struct Killer(Arc<Mutex<State>>);

#[derive(Debug, Default)]
enum State {
    /// The engine is not open yet.
    #[default]
    Unknown,
    /// The engine is to be killed as soon as it is open.
    Wanted,
    /// The engine runs in this process, and cannot be killed.
    InThisProcess,
    Process(EngineProcess),
}

impl Killer {
    /// Notes that the engine is open, with its process, and kills that if it is wanted already.
    pub(super) fn opened(&self, process: Option<EngineProcess>) {
        let mut state = self.0.lock();
        let opened = process.map_or(State::InThisProcess, State::Process);
        if let (State::Wanted, State::Process(process)) = (&*state, &opened) {
            process.kill();
        }
        *state = opened;
    }

    /// Kills the engine's process. Returns false if the engine runs in this process, where it cannot be killed.
    pub(super) fn kill(&self) -> bool {
        let mut state = self.0.lock();
        match &*state {
            State::Process(process) => process.kill(),
            State::Unknown | State::Wanted => *state = State::Wanted,
            State::InThisProcess => return false,
        }
        true
    }

    /// The number of the engine's process.
    pub(super) fn process_id(&self) -> Option<u32> {
        match &*self.0.lock() {
            State::Process(process) => Some(process.id()),
            State::Unknown | State::Wanted | State::InThisProcess => None,
        }
    }
}
