//! The state that request handlers share: the node, and the caller's rights.

use super::error::ApiError;
use exo_actors::models::ModelName;
use exo_actors::{ModelSpec, NodeHandle};
use std::collections::BTreeSet;
use std::sync::Arc;

/// The origin of a request, which decides its rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Caller {
    /// The owner of the node's data folder, over the Unix socket.
    Owner,
    /// A client that the guard admitted, over TCP.
    Network,
}

/// The state that request handlers share.
#[derive(Debug, Clone)]
pub(super) struct ApiContext {
    pub(super) node: NodeHandle,
    pub(super) caller: Caller,
    /// The models that clients over TCP, too, may name by path: the models that the node was started with.
    pub(super) named: Arc<BTreeSet<String>>,
}

impl ApiContext {
    /// The spec of the model that the caller names.
    ///
    /// # Errors
    /// 400 for an empty name. 404 for a path over TCP: only the owner may use paths, which reveal the disk.
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
            return Err(ApiError::bad_value("model", "is empty"));
        }
        let is_foreign_path = self.caller == Caller::Network && ModelName::parse(&spec.model).is_path();
        match is_foreign_path && !self.named.contains(&spec.model) {
            true => Err(ApiError::unknown_model(&spec.model)),
            false => Ok(()),
        }
    }

    /// Rejects callers over TCP.
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
