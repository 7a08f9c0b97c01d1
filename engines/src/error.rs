//! What can go wrong in an engine, and what kind of trouble it is.

use crate::format::FormatError;
use serde::{Deserialize, Serialize};

/// What an error asks of whoever sees it. Supervisors decide by it, never by a message's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorClass {
    /// The request is at fault: the same request will fail again.
    Caller,
    /// There is no room now: later it may go through.
    Overload,
    /// Something passed: the same again may succeed.
    Transient,
    /// The device does not answer any more.
    DeviceLost,
    /// The engine does not come back, and keeps its thread and its memory: the same again would take as much.
    Hung,
    /// The engine's state can no longer be trusted.
    Fatal,
}

/// Why an engine could not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum EngineError {
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error("{what} needs {needed_bytes} bytes, and {free_bytes} are free")]
    OutOfMemory { what: String, needed_bytes: u64, free_bytes: u64 },
    #[error("all {pages} pages of the KV cache are in use")]
    CacheFull { pages: u32 },
    #[error("a step of the incarnation {got} reached an engine at {current}")]
    StaleIncarnation { got: u64, current: u64 },
    #[error("the step is not valid: {what}")]
    BadStep { what: String },
    #[error("the engine has no model loaded")]
    NotLoaded,
    #[error("{what} is not supported by the engine `{engine}`")]
    Unsupported { engine: String, what: String },
    #[error("no device `{device}` for the engine `{engine}`")]
    NoDevice { engine: String, device: String },
    #[error("the engine's self-test failed: {what}")]
    SelfTest { what: String },
    #[error("the device `{device}` failed: {what}")]
    Device { device: String, what: String },
    #[error("the engine panicked: {what}")]
    Panicked { what: String },
    #[error("the engine has not come back from {from} for {seconds} s")]
    Hung { from: String, seconds: u64 },
    #[error("the device `{device}` has not come back from what an earlier shard gave it")]
    StillHung { device: String },
    #[error("nobody wants the shard any more")]
    Interrupted,
}

impl EngineError {
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Format(_) | Self::Unsupported { .. } | Self::NoDevice { .. } => ErrorClass::Caller,
            Self::OutOfMemory { .. } | Self::CacheFull { .. } => ErrorClass::Overload,
            Self::StaleIncarnation { .. } | Self::Interrupted => ErrorClass::Transient,
            Self::Device { .. } | Self::SelfTest { .. } => ErrorClass::DeviceLost,
            Self::Hung { .. } | Self::StillHung { .. } => ErrorClass::Hung,
            Self::BadStep { .. } | Self::NotLoaded | Self::Panicked { .. } => ErrorClass::Fatal,
        }
    }

    /// What the user can do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Format(error) => error.remedy(),
            Self::OutOfMemory { .. } => "close other programs, take a smaller quantisation or a smaller --context",
            Self::CacheFull { .. } => "wait for running requests to end, or start with a larger --context",
            Self::StaleIncarnation { .. } => "none needed: the step is sent again at the new incarnation",
            Self::Interrupted => "none needed: whoever let go of the shard knows",
            Self::Unsupported { .. } | Self::NoDevice { .. } => "choose another --device",
            Self::Device { .. } | Self::SelfTest { .. } => {
                "the CPU engine takes over; see the log for the device's state"
            }
            Self::Hung { .. } | Self::StillHung { .. } => {
                "its layers go on elsewhere; see the log and the system's, and start the node again to free what it holds"
            }
            Self::BadStep { .. } | Self::NotLoaded | Self::Panicked { .. } => {
                "this is a bug: the engine is restarted; please report it with the log"
            }
        }
    }
}
