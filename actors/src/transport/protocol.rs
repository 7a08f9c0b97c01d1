//! The messages that nodes exchange over the control connection, and the headers of data streams. The handshake
//! compares the protocol's version: members with different versions do not connect.
//!
//! ```text
//! every member ─Report, Desired─► every member           the sender's status; entries of the desired list
//! any member   ─Want─► leader     ─Refused─► the member  a request to place a model; the reason of a refusal
//! owner        ─StageOrder─► stage's node ─StageEvent─► owner
//! owner        ─Broken─► leader                          a shard needs another placement
//! ```

use crate::core::desired::{DesiredEntry, Stamp};
use crate::core::leader::{BrokenShard, PlacementRequest};
use crate::core::members::MemberReport;
use crate::core::request::RequestError;
use crate::core::scheduler::FinishReason;
use crate::core::spec::{FilesId, InstanceId, ModelSpec};
use crate::core::stage::{StageEvent, StageTask};
use exo_engines::engine::{DeviceId, Incarnation};
use exo_engines::sampler::{Sampled, SamplerSpec};
use exo_net::{NodeId, WireType};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// A message from node to node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum ControlMessage {
    /// The sender's report about itself.
    Report(Box<MemberReport>),
    /// Entries of the desired list.
    Desired(Vec<(InstanceId, DesiredEntry)>),
    /// The sender has requests for a model that the leader is to place.
    Want(Box<PlacementRequest>),
    /// The leader cannot place a model.
    Refused { spec: ModelSpec, error: RequestError },
    /// An owner's order to the node of a stage.
    Stage(StageOrder),
    /// An event of a stage, for its owner.
    StageEvent { instance: InstanceId, stamp: Stamp, event: StageEvent },
    /// A shard cannot run on its device.
    Broken(Box<BrokenShard>),
    /// The members that are no longer admitted.
    Evicted(Revisions),
}

/// The revision of each node that was ever evicted.
pub type Revisions = BTreeMap<NodeId, Revision>;

/// How often a node was evicted and admitted again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revision {
    /// Odd: the node is evicted; even: it may be a member.
    pub number: u64,
    /// The name of the member whose user decided so last.
    pub by: String,
}

impl Revision {
    pub(crate) fn is_evicted(&self) -> bool {
        self.number % 2 == 1
    }
}

impl ControlMessage {
    /// Whether peers outside the clique receive the message, too.
    pub(crate) fn is_for_all_peers(&self) -> bool {
        matches!(self, Self::Report(_) | Self::Evicted(_))
    }
}

/// The receiving end of a link: the shard of a stage, or the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) enum LinkEnd {
    Stage(usize),
    Head,
}

/// The first frame of a data stream, which names the stream's purpose.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum DataHello {
    Link(LinkHello),
    /// A request for the head of an instance. The head answers with its events.
    Request {
        instance: InstanceId,
        request: Box<HeadRequest>,
    },
    /// A request for bytes of a model. The peer answers with the bytes.
    Weights(WeightsRequest),
    /// A measurement of the link. The peer answers with meaningless bytes.
    Probe,
}

/// A request for parts of a model that the peer may have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WeightsRequest {
    /// The model's name, as the user wrote it.
    pub model: String,
    /// The requested files; `None`: any files with that name.
    pub files: Option<FilesId>,
    pub query: WeightsQuery,
}

/// The requested parts of a model. See `exo_engines::model::Pieces`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum WeightsQuery {
    /// The list of files, and the bytes of each before its first tensor.
    Outline,
    /// The hashes of all pieces, and which pieces the peer has.
    Hashes,
    /// The bytes of the pieces with these numbers.
    Pieces(Vec<u32>),
}

/// A frame of the answer to a [`WeightsRequest`]. An `Outline` lists the files, with the hashes of all pieces as
/// payload; `OutlineBytes` frames follow it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum WeightsResponse {
    /// The peer has no such model.
    Nothing,
    Outline {
        id: FilesId,
        is_folder: bool,
        files: Vec<OutlinedFile>,
    },
    /// A part of a file's outline, with its bytes as payload.
    OutlineBytes {
        file: u32,
        offset_bytes: u64,
    },
    /// The peer is computing the hashes, which must be known before it can answer.
    Preparing {
        done_bytes: u64,
    },
    /// The payload has a hash of 32 bytes for each piece, then a byte for each piece: 1 if the peer has it, else 0.
    Hashes {
        count: u32,
    },
    /// A piece, with its bytes as payload.
    Piece {
        number: u32,
    },
    /// The peer has the model, and cannot give it.
    Failed {
        why: String,
    },
}

/// A file of a model, with the length of the file and of its outline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OutlinedFile {
    pub name: String,
    pub length_bytes: u64,
    pub outline_bytes: u64,
}

/// The identity of a link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LinkHello {
    pub instance: InstanceId,
    pub incarnation: Incarnation,
    pub to: LinkEnd,
}

/// A request for a head: tokenised, and with the tokens generated so far if the request is resumed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct HeadRequest {
    pub sampler: SamplerSpec,
    /// The most tokens to generate, the tokens generated so far included.
    pub max_tokens: u32,
    /// Tokens that end the answer.
    pub ends: BTreeSet<u32>,
}

/// An event of a request, from its head.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum HeadEvent {
    /// The request will be answered.
    Accepted,
    /// The prompt is being computed, except its first `cached_tokens` tokens, which the prefix cache holds.
    Admitted {
        cached_tokens: usize,
    },
    Token(Sampled),
    Finished(FinishReason),
    Failed(RequestError),
}

/// An order of an owner to the node of a stage.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum StageOrder {
    /// Loads the shard. An equal shard that is already loaded stays.
    Start(Box<StageTask>),
    /// Connects the shard for an incarnation: rows come from node `from`, and output goes to `to` on node `next`.
    Wire {
        instance: InstanceId,
        stage: usize,
        /// Selects, with the device, one of the stage's two shards while an instance moves.
        layers: Range<usize>,
        device: DeviceId,
        incarnation: Incarnation,
        from: NodeId,
        next: NodeId,
        to: LinkEnd,
        wire_type: WireType,
    },
    /// Stops all shards of the instance with stamps below `below`.
    Clear { instance: InstanceId, below: Stamp },
}
