//! What handlers share: the node, and what the caller may do.

use super::ApiError;
use exo_actors::models::ModelName;
use exo_actors::{ModelSpec, NodeHandle};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Who calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Caller {
    /// The owner of the node's data, over the Unix socket.
    Owner,
    /// Anyone whom the guard let pass, over TCP.
    Network,
}

/// What handlers share.
#[derive(Debug, Clone)]
pub(super) struct ApiContext {
    pub(super) node: NodeHandle,
    pub(super) caller: Caller,
    /// The models that may be named by path over TCP, too: those that the node was started with.
    pub(super) named: Arc<BTreeSet<String>>,
}

impl ApiContext {
    /// The model that the caller names.
    ///
    /// # Errors
    /// 400 for an empty name. 404 for a path over TCP: a path reveals what is on the disk, so it is the owner's.
    pub(super) fn spec(&self, model: &str) -> Result<ModelSpec, ApiError> {
        let spec = ModelSpec::new(model);
        self.check(&spec)?;
        Ok(spec)
    }

    /// Checks that the caller may use the model of `spec`.
    ///
    /// # Errors
    /// As [`spec`](Self::spec).
    pub(super) fn check(&self, spec: &ModelSpec) -> Result<(), ApiError> {
        if spec.model.is_empty() {
            return Err(ApiError::bad_value("model", "names no model"));
        }
        let is_foreign_path = self.caller == Caller::Network && ModelName::parse(&spec.model).is_path();
        match is_foreign_path && !self.named.contains(&spec.model) {
            true => Err(ApiError::unknown_model(&spec.model)),
            false => Ok(()),
        }
    }

    /// Refuses callers over TCP.
    ///
    /// # Errors
    /// 403.
    pub(super) fn require_owner(&self) -> Result<(), ApiError> {
        match self.caller {
            Caller::Owner => Ok(()),
            Caller::Network => Err(ApiError::owner_only()),
        }
    }
}
