//! What happens on a node, as its actors report it and subscribers receive it.

use crate::core::clique::Outside;
use crate::core::members::MemberReport;
use crate::core::memory_watch::MemoryGrowth;
use crate::core::plan::Placement;
use crate::core::spec::{InstanceId, Model};
use crate::core::status::{GpuStatus, KeyClash, Load, Machine, Totals};
use crate::core::step_times::SlowDown;
use exo_engines::engine::{DeviceId, DeviceReport};
use exo_engines::hardware::{GpuSample, PciAddress};
use exo_net::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// Something that happened on this node, or to its peers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Fact {
    /// A factory found a device when the node started.
    DeviceFound(DeviceReport),
    /// The machine has a GPU: found when the node started.
    GpuFound(Box<GpuStatus>),
    /// The GPUs were measured.
    GpusMeasured(BTreeMap<PciAddress, GpuSample>),
    /// A device of this node has failed, and is left alone until its next probe.
    DeviceFailed {
        /// The device.
        device: DeviceId,
        /// Why.
        trouble: DeviceTrouble,
    },
    /// A device that had failed has passed its probe.
    DeviceRecovered(DeviceId),
    /// Memory of the machine that neither processes nor caches account for has grown: a driver may leak. `None`: it is
    /// about what it was before.
    MachineLeaks(Option<MemoryGrowth>),
    /// The machine was measured, as happens every second.
    MachineMeasured(Machine),
    /// An instance whose head is on this node starts, or moves to another placement.
    InstancePlaced {
        /// The instance.
        instance: InstanceId,
        /// What it runs.
        model: Model,
        /// Where it runs.
        placement: Placement,
    },
    /// A stage's node fetches the weights of its layers.
    ShardFetching {
        /// The instance.
        instance: InstanceId,
        /// The stage's position in the pipeline, from 0.
        stage: usize,
        /// Bytes fetched so far.
        fetched_bytes: u64,
        /// Bytes to fetch in all.
        total_bytes: u64,
    },
    /// A stage's engine loads the weights of its layers.
    ShardLoading {
        /// The instance.
        instance: InstanceId,
        /// The stage's position in the pipeline, from 0.
        stage: usize,
        /// Bytes loaded so far.
        loaded_bytes: u64,
        /// Bytes to load in all.
        total_bytes: u64,
    },
    /// A stage's shard is loaded.
    ShardLoaded {
        /// The instance.
        instance: InstanceId,
        /// The stage's position in the pipeline, from 0.
        stage: usize,
        /// The device: the one of its placement, or the fallback of that node.
        device: DeviceId,
    },
    /// A stage's shard has become slow, or is as fast as before again.
    ShardSpeed {
        /// The instance.
        instance: InstanceId,
        /// The stage's position in the pipeline, from 0.
        stage: usize,
        /// How slow; `None`: not slow any more.
        slow_down: Option<SlowDown>,
    },
    /// The process of a stage's shard holds memory that nothing explains. Another one takes over if memory suffices.
    ShardLeaks {
        /// The instance.
        instance: InstanceId,
        /// The stage's position in the pipeline, from 0.
        stage: usize,
        /// The unexplained memory; `None`: it is about what it was before.
        growth: Option<MemoryGrowth>,
    },
    /// All shards are loaded and connected: the instance serves.
    InstanceReady {
        /// The instance.
        instance: InstanceId,
        /// The epoch of its incarnation.
        epoch: u64,
    },
    /// A shard failed: requests wait until it is restarted, or placed elsewhere.
    ShardFailed {
        /// The instance.
        instance: InstanceId,
        /// The stage's position in the pipeline, from 0.
        stage: usize,
        /// What failed.
        error: String,
    },
    /// The head of an instance on this node ended.
    InstanceStopped {
        /// The instance.
        instance: InstanceId,
        /// Why, if it failed.
        error: Option<String>,
    },
    /// The requests of an instance changed in number or progress.
    RequestsChanged {
        /// The instance.
        instance: InstanceId,
        /// The requests in progress, and the cache pages in use.
        load: Load,
        /// What it has done so far.
        totals: Totals,
    },
    /// A member sent its report.
    MemberReported {
        /// The member.
        node: NodeId,
        /// Its report.
        report: Box<MemberReport>,
    },
    /// A peer was lost.
    MemberLost {
        /// The peer.
        node: NodeId,
        /// Why.
        reason: String,
        /// When, in seconds since 1970.
        at_s: u64,
    },
    /// Other nodes reach this one at these addresses now.
    AddressesChanged(Vec<SocketAddr>),
    /// A member is missing at an address, or is there again.
    AddressTried {
        /// The address.
        address: SocketAddr,
        /// Why no member answers there; `None`: one answers.
        failure: Option<String>,
    },
    /// Two running nodes have the same key.
    SameKey(KeyClash),
    /// Two nodes have not been seen with the same key for a while.
    SameKeyOver(KeyClash),
    /// These nodes are not admitted.
    EvictionsChanged(BTreeMap<NodeId, String>),
    /// A connected peer is outside this node's clique.
    PeerOutside {
        /// The peer.
        node: NodeId,
        /// Why.
        outside: Outside,
    },
}

impl Fact {
    /// The instance that the fact is about.
    pub fn instance(&self) -> Option<InstanceId> {
        match self {
            Self::InstancePlaced { instance, .. }
            | Self::ShardFetching { instance, .. }
            | Self::ShardLoading { instance, .. }
            | Self::ShardLoaded { instance, .. }
            | Self::ShardSpeed { instance, .. }
            | Self::ShardLeaks { instance, .. }
            | Self::InstanceReady { instance, .. }
            | Self::ShardFailed { instance, .. }
            | Self::InstanceStopped { instance, .. }
            | Self::RequestsChanged { instance, .. } => Some(*instance),
            Self::DeviceFound(_)
            | Self::GpuFound(_)
            | Self::GpusMeasured(_)
            | Self::DeviceFailed { .. }
            | Self::DeviceRecovered(_)
            | Self::MachineLeaks(_)
            | Self::MachineMeasured(_)
            | Self::MemberReported { .. }
            | Self::MemberLost { .. }
            | Self::AddressesChanged(_)
            | Self::AddressTried { .. }
            | Self::SameKey(_)
            | Self::SameKeyOver(_)
            | Self::EvictionsChanged(_)
            | Self::PeerOutside { .. } => None,
        }
    }
}

/// Why a device is left alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceTrouble {
    /// The error.
    pub error: String,
    /// Advice for the user.
    pub remedy: String,
    /// When the device is tried again, in seconds since 1970.
    pub probe_at_s: u64,
}
