//! What an engine's thread does, and how long its steps take, for its shard's watchdog.

use crate::core::step_times::StepTimes;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Instant;

/// The current activity of an engine's thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum EngineActivity {
    #[default]
    Loading,
    Waiting,
    Step {
        rows: usize,
    },
}

/// The activity of an engine's thread, for its shard's watchdog.
#[derive(Debug, Clone, Default)]
pub(crate) struct Heartbeat(Arc<Mutex<Pulse>>);

/// What a heartbeat shows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pulse {
    /// The number of changes so far.
    pub beats: u64,
    pub activity: EngineActivity,
    /// When the activity began.
    since: Option<Instant>,
    /// The times of finished steps.
    pub times: StepTimes,
    /// The most memory that the engine has accounted for; 0 before it is loaded.
    pub memory_max_bytes: u64,
}

impl Heartbeat {
    pub(super) fn beat(&self, activity: EngineActivity) {
        let mut pulse = self.0.lock();
        if let (EngineActivity::Step { rows: rows @ 1.. }, Some(since)) = (pulse.activity, pulse.since) {
            pulse.times.note(rows, since.elapsed());
        }
        pulse.beats += 1;
        (pulse.activity, pulse.since) = (activity, Some(Instant::now()));
    }

    pub(super) fn note_memory(&self, bytes: u64) {
        let mut pulse = self.0.lock();
        pulse.memory_max_bytes = pulse.memory_max_bytes.max(bytes);
    }

    pub(crate) fn activity(&self) -> EngineActivity {
        self.0.lock().activity
    }

    pub(crate) fn read(&self) -> Pulse {
        self.0.lock().clone()
    }
}
