//! The outcome of a command.

/// How a command ended that did not fail.
pub(super) enum Outcome {
    Done,
    /// Done, and a check has failed, as the command has said.
    ChecksFailed,
    /// Ended by Ctrl-C.
    Interrupted,
}
