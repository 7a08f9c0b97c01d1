//! What ends an engine that does not return.

use exo_engines::engine::KillSwitch;
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
    Process(KillSwitch),
}

impl Killer {
    /// Notes that the engine is open, with its kill switch, and kills it if that is wanted already.
    pub(super) fn opened(&self, switch: Option<KillSwitch>) {
        let mut state = self.0.lock();
        let opened = switch.map_or(State::InThisProcess, State::Process);
        if let (State::Wanted, State::Process(switch)) = (&*state, &opened) {
            switch.kill();
        }
        *state = opened;
    }

    /// Kills the engine's process. Returns false if the engine runs in this process, where it cannot be killed.
    pub(super) fn kill(&self) -> bool {
        let mut state = self.0.lock();
        match &*state {
            State::Process(switch) => switch.kill(),
            State::Unknown | State::Wanted => *state = State::Wanted,
            State::InThisProcess => return false,
        }
        true
    }
}
