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

/// The part of a device or of its software that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DeviceFault {
    /// The driver is missing, or reports an error.
    Driver,
    /// The library between the engine and the driver is missing or too old.
    Runtime,
    /// This user may not use the device.
    Permission,
    /// The device was reset or removed.
    Lost,
    /// The driver cannot compile a kernel.
    Compile,
    /// The operating system refuses threads or processes.
    System,
}

impl DeviceFault {
    fn remedy(self) -> &'static str {
        match self {
            Self::Driver => "the CPU engine takes over; install or update the device's driver, and see the system log",
            Self::Runtime => "the CPU engine takes over; install or update the device's runtime",
            Self::Permission => "add this user to the group that owns the device, such as `render`, and log in again",
            Self::Lost => "the CPU engine takes over; see the system log for why the device was reset",
            Self::Compile => "the CPU engine takes over; update the device's driver, and report this with the log",
            Self::System => "raise this user's limit on processes, or close other programs",
        }
    }
}

/// The reason why an engine call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum EngineError {
    /// A model file cannot be read, or is not valid.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Memory does not suffice.
    #[error("{what} needs {needed_bytes} bytes, but {free_bytes} are free")]
    OutOfMemory {
        /// The thing that needs the memory.
        what: String,
        /// Bytes needed; `u64::MAX` if their number overflows.
        needed_bytes: u64,
        /// Bytes free.
        free_bytes: u64,
    },
    /// The free cache pages do not suffice for the step's rows.
    #[error("all {pages} pages of the KV cache are in use")]
    CacheFull {
        /// The cache's capacity, in pages.
        pages: u32,
    },
    /// The step belongs to an older incarnation than the engine has seen.
    #[error("the step's incarnation (epoch {got}) is older than the engine's (epoch {current})")]
    StaleIncarnation {
        /// The epoch of the step.
        got: u64,
        /// The epoch of the engine's incarnation.
        current: u64,
    },
    /// A step, or the spec of a shard, is not valid.
    #[error("the step is not valid: {what}")]
    BadStep {
        /// The fault.
        what: String,
    },
    /// The engine has no model loaded.
    #[error("the engine has no model loaded")]
    NotLoaded,
    /// The engine does not support a property of the model or the shard.
    #[error("{what} is not supported by the engine `{engine}`")]
    Unsupported {
        /// The engine's name.
        engine: String,
        /// The property.
        what: String,
    },
    /// The engine's factory has no such device.
    #[error("no device `{device}` for the engine `{engine}`")]
    NoDevice {
        /// The engine's name.
        engine: String,
        /// The id of the requested device.
        device: String,
    },
    /// The engine computed known numbers wrongly, or a first row that is not finite.
    #[error("the engine's self-test failed: {what}")]
    SelfTest {
        /// The fault.
        what: String,
    },
    /// The device failed, or cannot run the engine.
    #[error("the device `{device}` failed: {what}")]
    Device {
        /// The name of the device, or of a rank of a tensor-sharded layer.
        device: String,
        /// The part that failed.
        fault: DeviceFault,
        /// The cause.
        what: String,
    },
    /// The engine or one of its threads panicked.
    #[error("the engine panicked: {what}")]
    Panicked {
        /// The text of the panic.
        what: String,
    },
    /// A call to the engine makes no progress and does not return.
    #[error("the engine has not returned from {from} for {seconds} s")]
    Hung {
        /// The call: a load, or a step of some number of rows.
        from: String,
        /// Seconds since the engine's last sign of progress.
        seconds: u64,
    },
    /// The device computed values that cannot be right.
    #[error("the device `{device}` computes wrong numbers: {what}")]
    Numerics {
        /// The id of the device.
        device: String,
        /// The fault.
        what: String,
    },
    /// The process of the engine could not be started.
    #[error("the engine's process `{program}` cannot be started: {what}")]
    WorkerNotStarted {
        /// The path of the program.
        program: String,
        /// The system's error.
        what: String,
    },
    /// The process of the engine is a program of another version.
    #[error("the engine's process is {found}, not {expected}")]
    WorkerVersion {
        /// The program that was found.
        found: String,
        /// The program that was expected.
        expected: String,
    },
    /// The process of the engine ended or broke off.
    #[error("the engine's process ended: {what}{}", after_lines(last_lines))]
    WorkerEnded {
        /// How it ended.
        what: String,
        /// The last lines that it wrote to its standard error.
        last_lines: Vec<String>,
    },
    /// The process of the engine was killed, because it hung.
    #[error("the engine's process was killed: it had not returned from {from} for {seconds} s")]
    Killed {
        /// The call: loading, or a step of some number of rows.
        from: String,
        /// Seconds since the engine's last sign of progress.
        seconds: u64,
    },
    /// A call for an earlier shard has not returned, so the device accepts no new shard.
    #[error("the device `{device}` still hangs on the work of an earlier shard")]
    StillHung {
        /// The id of the device.
        device: String,
    },
    /// The caller stopped the load.
    #[error("the load was stopped because the shard is no longer needed")]
    Interrupted,
}

impl EngineError {
    /// Returns the error of an engine that panicked with this payload.
    pub fn of_panic(payload: &(dyn std::any::Any + Send)) -> Self {
        let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
        Self::Panicked { what: text.unwrap_or_else(|| "no message".to_owned()) }
    }

    /// Returns the error's class.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Format(_) | Self::Unsupported { .. } | Self::NoDevice { .. } => ErrorClass::Caller,
            Self::OutOfMemory { .. } | Self::CacheFull { .. } => ErrorClass::Overload,
            Self::StaleIncarnation { .. } | Self::Interrupted => ErrorClass::Transient,
            Self::Device { .. }
            | Self::SelfTest { .. }
            | Self::Numerics { .. }
            | Self::WorkerNotStarted { .. }
            | Self::WorkerVersion { .. }
            | Self::Killed { .. } => ErrorClass::DeviceLost,
            Self::Hung { .. } | Self::StillHung { .. } => ErrorClass::Hung,
            Self::BadStep { .. } | Self::NotLoaded | Self::Panicked { .. } | Self::WorkerEnded { .. } => {
                ErrorClass::Fatal
            }
        }
    }

    /// Returns the error with texts of at most `length` printable characters. Another process may send any.
    pub(crate) fn shortened(mut self, length: usize) -> Self {
        let shorten = |text: &mut String| {
            *text = text.chars().filter(|c| !c.is_control()).take(length).collect();
        };
        match &mut self {
            Self::OutOfMemory { what, .. }
            | Self::BadStep { what }
            | Self::SelfTest { what }
            | Self::Panicked { what }
            | Self::WorkerEnded { what, .. }
            | Self::Killed { from: what, .. }
            | Self::Hung { from: what, .. } => shorten(what),
            Self::Unsupported { engine: first, what: second }
            | Self::NoDevice { engine: first, device: second }
            | Self::Device { device: first, what: second, .. }
            | Self::Numerics { device: first, what: second }
            | Self::WorkerNotStarted { program: first, what: second }
            | Self::WorkerVersion { found: first, expected: second } => {
                shorten(first);
                shorten(second);
            }
            Self::StillHung { device } => shorten(device),
            // Errors of files name paths and tensors of this machine.
            Self::Format(_)
            | Self::CacheFull { .. }
            | Self::StaleIncarnation { .. }
            | Self::NotLoaded
            | Self::Interrupted => {}
        }
        self
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
            Self::Device { fault, .. } => fault.remedy(),
            Self::SelfTest { .. } | Self::Numerics { .. } => {
                "the CPU engine takes over; update the device's driver, and check the device's memory and temperature"
            }
            Self::WorkerNotStarted { .. } => {
                "make the program executable, or raise this user's limits on files and processes"
            }
            Self::WorkerVersion { .. } => "restart the node, so that it runs the program that is installed now",
            Self::WorkerEnded { .. } | Self::Killed { .. } => {
                "none needed: the engine is started again; if that recurs, see this log and the system log"
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

/// The clause of the last lines in an error's text.
fn after_lines(lines: &[String]) -> String {
    match lines.is_empty() {
        true => String::new(),
        false => format!("; it last wrote: {}", lines.join(" | ")),
    }
}
