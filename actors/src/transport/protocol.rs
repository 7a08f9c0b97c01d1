//! The messages that nodes exchange over the control connection. The handshake compares the protocol's version: members with
//! different versions do not connect.
//!
//! ```text
//! every member ─Report, Desired─► every member           its status; the deployments that are to run
//! any member   ─Want─► leader     ─Refused─► the member  a model is needed; why it cannot run
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
use exo_engines::engine::Incarnation;
use exo_engines::sampler::{Sampled, SamplerSpec};
use exo_net::{NodeId, WireType};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::ops::Range;

/// A message from node to node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum ControlMessage {
    /// The sender's report of itself.
    Report(Box<MemberReport>),
    /// Entries of the desired list.
    Desired(Vec<(InstanceId, DesiredEntry)>),
    /// Requests of the sender need a model to run.
    Want(Box<PlacementRequest>),
    /// The leader cannot place a model.
    Refused { spec: ModelSpec, error: RequestError },
    /// An owner's order to the node of a stage.
    Stage(StageOrder),
    /// What became of a stage, for its owner.
    StageEvent { instance: InstanceId, stamp: Stamp, event: StageEvent },
    /// A device has failed a shard for good.
    Broken(Box<BrokenShard>),
    /// The members that are no longer admitted.
    Evicted(BTreeSet<NodeId>),
}

impl ControlMessage {
    /// Whether peers outside the clique are sent it, too.
    pub(crate) fn is_for_all_peers(&self) -> bool {
        matches!(self, Self::Report(_) | Self::Evicted(_))
    }
}

/// One end of a link between shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) enum LinkEnd {
    Stage(usize),
    Head,
}

/// The first frame of a data stream: what it is for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum DataHello {
    Link(LinkHello),
    /// A request for the head of an instance; its events come back.
    Request {
        instance: InstanceId,
        request: Box<HeadRequest>,
    },
    /// Bytes of a model; they come back.
    Weights(WeightsRequest),
    /// Bytes of no meaning come back, to measure the link with.
    Probe,
}

/// What a node wants of a model that others may have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WeightsRequest {
    /// As the user named it.
    pub model: String,
    /// `None`: whichever files have that name.
    pub files: Option<FilesId>,
    pub query: WeightsQuery,
}

/// See `engines::model::Pieces`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum WeightsQuery {
    /// Files, and what stands in them before their tensors.
    Outline,
    /// Of every piece; and which of them are there.
    Hashes,
    Pieces(Vec<u32>),
}

/// What comes back, frame by frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum WeightsResponse {
    /// That node has no such model.
    Nothing,
    Outline {
        id: FilesId,
        is_folder: bool,
        files: Vec<OutlinedFile>,
    },
    /// With bytes.
    OutlineBytes {
        file: u32,
        offset_bytes: u64,
    },
    /// Hashes are being computed.
    Preparing {
        done_bytes: u64,
        total_bytes: u64,
    },
    /// With 32 bytes for each piece, and then for each a byte that says whether it is there.
    Hashes {
        count: u32,
    },
    /// With its bytes.
    Piece {
        number: u32,
    },
}

/// A file of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OutlinedFile {
    pub name: String,
    pub length_bytes: u64,
    pub outline_bytes: u64,
}

/// Which link a stream is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LinkHello {
    pub instance: InstanceId,
    pub incarnation: Incarnation,
    pub to: LinkEnd,
}

/// A request as a head takes it: encoded, and with what was generated before where it is resumed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct HeadRequest {
    pub sampler: SamplerSpec,
    /// Tokens to generate at most, those generated before included.
    pub max_tokens: u32,
    /// Tokens that end the answer.
    pub ends: BTreeSet<u32>,
}

/// What a head tells of a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum HeadEvent {
    /// It will be answered.
    Accepted,
    /// Its prompt is being computed, but for the first tokens, which had been computed for others.
    Admitted {
        cached_tokens: usize,
    },
    Token(Sampled),
    Finished(FinishReason),
    Failed(RequestError),
}

/// What an owner asks of the node of a stage.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum StageOrder {
    /// Has the shard loaded; one that is there already stays.
    Start(Box<StageTask>),
    /// Begins a life: rows come from `from`, and go to `to` on `next`.
    Wire {
        instance: InstanceId,
        stage: usize,
        /// Of the stage's two shards while an instance moves.
        layers: Range<usize>,
        incarnation: Incarnation,
        from: NodeId,
        next: NodeId,
        to: LinkEnd,
        wire_type: WireType,
    },
    /// Lets go of all shards of the instance that are of an earlier stamp.
    Clear { instance: InstanceId, below: Stamp },
}
