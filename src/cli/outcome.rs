//! The outcome of a command.

/// How a command ended that did not fail.
pub(super) enum Outcome {
    Done,
    /// Ended by Ctrl-C.
    Interrupted,
}
