//! How a command ends.

/// How a command ended, where it did not fail.
pub(super) enum Outcome {
    Done,
    /// By Ctrl-C.
    Interrupted,
}
