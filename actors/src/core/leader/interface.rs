//! The inputs and effects of the leader's rounds.

use crate::core::desired::{Desired, DesiredEntry, Target};
use crate::core::members::Members;
use crate::core::plan::Demand;
use crate::core::request::RequestError;
use crate::core::spec::{InstanceId, Model, ModelSpec};
use exo_net::NodeId;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// A request for an instance of a model, with the facts that the planner needs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlacementRequest {
    /// The requested spec.
    pub spec: ModelSpec,
    /// The model that the spec resolves to, with the largest context that it may get.
    pub model: Model,
    /// The memory and work that the model needs, with the cache of that context.
    pub demand: Demand,
}

/// The inputs and the effects of a round.
#[derive(Debug)]
pub struct RoundContext<'a> {
    /// This node.
    pub own: NodeId,
    /// The time since any fixed start.
    pub now: Duration,
    /// The latest report of each member.
    pub members: &'a Members,
    /// The desired list, which a round writes.
    pub desired: &'a mut Desired,
    /// How long an unused model stays loaded; `None`: for ever.
    pub idle: Option<Duration>,
    /// The seed of new instances' ids: any number that seldom repeats.
    pub seed: u64,
    /// What the round did, in order, for the other members.
    pub effects: Vec<Effect>,
}

/// A decision that other members must learn of.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// An entry of the desired list was written.
    Written {
        /// The entry's instance.
        id: InstanceId,
        /// The new entry.
        entry: DesiredEntry,
        /// The spec that the instance ran until then, if it ran.
        was: Option<ModelSpec>,
    },
    /// A placement request was refused.
    Refused {
        /// The node that requested the model.
        to: NodeId,
        /// The requested spec.
        spec: ModelSpec,
        /// Why the model cannot be placed.
        error: RequestError,
    },
}

impl RoundContext<'_> {
    /// Writes an entry of the desired list.
    pub fn set(&mut self, id: InstanceId, target: Target) {
        let was = self.desired.get(id).and_then(DesiredEntry::deployment).map(|deployment| deployment.spec.clone());
        let entry = self.desired.set(id, target, self.now);
        self.effects.push(Effect::Written { id, entry, was });
    }

    /// The id of a new instance.
    pub(super) fn fresh_id(&mut self) -> InstanceId {
        // splitmix64, cut to 32 bits: an id must be short enough to read aloud.
        self.seed = self.seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = (self.seed ^ (self.seed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        InstanceId((mixed ^ (mixed >> 31)) >> 32)
    }
}
