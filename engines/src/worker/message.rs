//! The messages between a node and its worker, and their encoding. No other module of this crate uses bincode.

use crate::engine::{
    DeviceId, DeviceRates, DeviceReport, LoadProgress, LoadReport, RowQuery, RowScores, Runtime, SelfTestReport,
    ShardSpec, Step, WarmUpReport,
};
use crate::error::EngineError;
use crate::hardware::PciAddress;
use crate::model::WeightSource;
use crate::profile::Profile;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// The version of the messages. A worker of another version is refused.
const VERSION: u32 = 3;

/// The longest message, in bytes: the tensors of a shard with many experts take a few MiB.
pub(super) const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// The first message of a worker. Its encoding never changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) messages: u32,
    pub(super) exo: String,
}

impl std::fmt::Display for Hello {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "exo {}, messages {}", self.exo, self.messages)
    }
}

impl Hello {
    /// The greeting of this program.
    pub(super) fn own() -> Self {
        Self { messages: VERSION, exo: env!("CARGO_PKG_VERSION").to_owned() }
    }
}

/// A request of the node. Its reply follows.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request<'a> {
    /// Lists the devices of an engine.
    Probe {
        engine: Cow<'a, str>,
        /// The most detailed level of events that the node logs.
        log: LogLevel,
    },
    /// Tells what an engine needs at run time, and what is there of it.
    Runtime {
        engine: Cow<'a, str>,
        /// The most detailed level of events that the node logs.
        log: LogLevel,
    },
    /// Opens an engine.
    Open {
        engine: Cow<'a, str>,
        device: Cow<'a, DeviceId>,
        /// Where the device was when it was listed. Numbers may have moved since.
        address: Option<PciAddress>,
        /// The most detailed level of events that the node logs.
        log: LogLevel,
    },
    SelfTest,
    Measure,
    /// Replies are [`Reply::Progress`], then [`Reply::Loaded`].
    Load {
        shard: Cow<'a, ShardSpec>,
        weights: Cow<'a, WeightSource>,
    },
    WarmUp,
    /// Computes a step. Hidden rows follow as values.
    Forward {
        step: Cow<'a, Step>,
        /// The tokens; `None`: the input is hidden rows.
        tokens: Option<Cow<'a, [u32]>>,
        queries: Cow<'a, [RowQuery]>,
    },
    /// All logits of a row of the last step.
    Logits {
        row: usize,
    },
    TakeProfile,
}

/// A reply of the worker.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    Devices(Vec<DeviceReport>),
    Runtime(Runtime),
    Opened,
    Tested(SelfTestReport),
    Measured(DeviceRates),
    Progress(LoadProgress),
    Loaded(LoadReport),
    WarmedUp(WarmUpReport),
    /// The output of a step. The values are hidden rows, or those of the scores.
    Output {
        /// `None`: the output is hidden rows.
        scores: Option<Vec<RowScores>>,
        memory_bytes: u64,
        pages_used: u32,
    },
    /// The values are the logits.
    Logits,
    Profile(Box<Profile>),
    /// The request failed, and the worker ends.
    Failed(EngineError),
}

/// The level of a log event, from few events to many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum LogLevel {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// Why a message cannot be encoded or decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum MessageError {
    #[error("a message cannot be encoded: {0}")]
    Encode(String),
    #[error("a message cannot be decoded: {0}")]
    Decode(String),
}

pub(super) fn encode<T: Serialize>(message: &T, into: &mut Vec<u8>) -> Result<(), MessageError> {
    let written = bincode::serde::encode_into_std_write(message, into, bincode::config::standard());
    written.map(|_| ()).map_err(|error| MessageError::Encode(error.to_string()))
}

pub(super) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, MessageError> {
    let config = bincode::config::standard().with_limit::<MESSAGE_BYTES_MAX>();
    let decoded = bincode::serde::decode_from_slice(bytes, config);
    let (message, read) = decoded.map_err(|error| MessageError::Decode(error.to_string()))?;
    match bytes.len() - read {
        0 => Ok(message),
        rest => Err(MessageError::Decode(format!("{rest} bytes follow the message"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<Request<'static>>(&bytes);
            let _ = decode::<Reply>(&bytes);
            let _ = decode::<Hello>(&bytes);
        }
    }
}
