//! Errors of engines, and their classes.

use crate::format::FormatError;
use serde::{Deserialize, Serialize};

/// The class of an error. Supervisors decide by the class, never by the text of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorClass {
    /// The request is at fault: the same request fails again.
    Caller,
    /// Memory is short now: a later attempt may succeed.
    Overload,
    /// The cause is temporary: a retry may succeed.
    Transient,
    /// The device has failed.
    DeviceLost,
    /// A call to the engine does not return, and holds its thread and memory: each retry can hold as much again.
    Hung,
    /// The engine's state can no longer be trusted.
    Fatal,
}

/// The reason why an engine call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum EngineError {
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error("{what} needs {needed_bytes} bytes, but {free_bytes} are free")]
    OutOfMemory { what: String, needed_bytes: u64, free_bytes: u64 },
    #[error("all {pages} pages of the KV cache are in use")]
    CacheFull { pages: u32 },
    #[error("the step's incarnation (epoch {got}) is older than the engine's (epoch {current})")]
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
    #[error("the engine has not returned from {from} for {seconds} s")]
    Hung { from: String, seconds: u64 },
    #[error("the device `{device}` still hangs on the work of an earlier shard")]
    StillHung { device: String },
    #[error("the load was stopped because the shard is no longer needed")]
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

    /// Returns advice for the user.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Format(error) => error.remedy(),
            Self::OutOfMemory { .. } => "close other programs, or choose a smaller quantisation or context",
            Self::CacheFull { .. } => "wait for running requests to end, or start the model with a larger context",
            Self::StaleIncarnation { .. } => "none needed: the step is sent again in the new incarnation",
            Self::Interrupted => "none needed: the shard was released during its load",
            Self::Unsupported { .. } | Self::NoDevice { .. } => "choose another device",
            Self::Device { .. } | Self::SelfTest { .. } => {
                "the CPU engine takes over; see the log for the device's state"
            }
            Self::Hung { .. } | Self::StillHung { .. } => {
                "its layers move elsewhere; see this log and the system log, and restart the node to free its memory"
            }
            Self::BadStep { .. } | Self::NotLoaded | Self::Panicked { .. } => {
                "this is a bug: the engine is restarted; please report it with the log"
            }
        }
    }
}
