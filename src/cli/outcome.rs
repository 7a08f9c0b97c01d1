//! The outcome of a command.

/// How a command ended that did not fail.
pub(super) enum Outcome {
    Done,
    /// Done, and what was looked at is not well; the command has said so.
    Unwell,
    /// Ended by Ctrl-C.
    Interrupted,
}
