//! What becomes of a model that is wanted, and what room it takes.

use super::EnsureReply;
use crate::core::plan::Placement;
use crate::core::view::InstanceId;
use crate::instance::InstanceRef;
use crate::models::ResolvedModel;
use crate::request::RequestError;
use crate::tokenizer::TokenizerRef;
use exo_engines::tokenizer::Tokenizer;
use std::sync::Arc;
use std::time::Instant;

/// A running model, as requests use it. It stays in memory as long as anyone holds this.
#[derive(Debug, Clone)]
pub struct RunningModel {
    pub id: InstanceId,
    pub(crate) instance: InstanceRef,
    pub(crate) tokenizer_ref: TokenizerRef,
    pub tokenizer: Arc<Tokenizer>,
    pub model: Arc<ResolvedModel>,
    pub placement: Placement,
    pub context_tokens: u32,
    pub(crate) in_use: Arc<()>,
}

#[derive(Debug)]
pub(super) enum Wanted {
    Resolving {
        waiting: Vec<EnsureReply>,
    },
    /// There is no room for it now; others are leaving.
    Crowded {
        waiting: Vec<EnsureReply>,
        model: Arc<ResolvedModel>,
    },
    Starting {
        waiting: Vec<EnsureReply>,
        placed: Placed,
    },
    Running {
        running: RunningModel,
        last_used: Instant,
    },
}

#[derive(Debug)]
pub(super) struct Placed {
    pub(super) id: InstanceId,
    pub(super) instance: InstanceRef,
    pub(super) model: Arc<ResolvedModel>,
    pub(super) placement: Placement,
    pub(super) context_tokens: u32,
}

impl Wanted {
    fn parts(&self) -> Option<(InstanceId, &InstanceRef, &Placement)> {
        match self {
            Self::Resolving { .. } | Self::Crowded { .. } => None,
            Self::Starting { placed, .. } => Some((placed.id, &placed.instance, &placed.placement)),
            Self::Running { running, .. } => Some((running.id, &running.instance, &running.placement)),
        }
    }

    pub(super) fn id(&self) -> Option<InstanceId> {
        self.parts().map(|(id, ..)| id)
    }

    pub(super) fn id_of(&self, actor: ractor::ActorId) -> Option<InstanceId> {
        self.parts().filter(|(_, instance, _)| instance.get_id() == actor).map(|(id, ..)| id)
    }

    /// Memory that it was promised.
    pub(super) fn promised_bytes(&self) -> u64 {
        self.parts().map_or(0, |(.., placement)| memory_bytes(placement))
    }

    /// Since when nobody uses it; `None` where someone does, or it does not run.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        match self {
            // One is the planner's own.
            Self::Running { running, last_used } if Arc::strong_count(&running.in_use) == 1 => Some(*last_used),
            _ => None,
        }
    }
}

pub(super) fn memory_bytes(placement: &Placement) -> u64 {
    placement.stages.iter().map(|stage| stage.memory_bytes).sum()
}

pub(super) fn reply_all(waiting: Vec<EnsureReply>, outcome: &Result<RunningModel, RequestError>) {
    for reply in waiting {
        // Whoever asked may have gone.
        let _ = reply.send(outcome.clone());
    }
}
