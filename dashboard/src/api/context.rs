//! The state that request handlers share: the node, and the caller's rights.

use super::error::ApiError;
use exo_actors::models::{ModelName, absolute_path};
use exo_actors::{ModelSpec, NodeHandle};
use std::collections::BTreeMap;
use std::path::PathBuf;
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
    pub(super) named: Arc<NamedModels>,
}

/// The models that clients over TCP, too, may name by path: the models that the node was started with.
#[derive(Debug, Default)]
pub(super) struct NamedModels {
    /// The names as the user wrote them, by absolute path. All spellings of a path lead to the same instance.
    paths: BTreeMap<PathBuf, String>,
}

impl NamedModels {
    /// Keeps those of `names` that are paths. Blocks on the disk.
    pub(super) fn new(names: impl IntoIterator<Item = String>) -> Self {
        let mut paths = BTreeMap::new();
        for name in names {
            let ModelName::Path(path) = ModelName::parse(&name) else { continue };
            let spellings = [absolute_path(&path), std::path::absolute(path)];
            paths.extend(spellings.into_iter().flatten().map(|spelling| (spelling, name.clone())));
        }
        Self { paths }
    }

    /// The name that the user wrote for the path `model`. Does not look at the disk, which a client must not probe.
    fn find(&self, model: &str) -> Option<&String> {
        let ModelName::Path(path) = ModelName::parse(model) else { return None };
        self.paths.get(&std::path::absolute(path).ok()?)
    }
}

impl ApiContext {
    /// The spec of the model that the caller names.
    ///
    /// # Errors
    /// 400 for an empty name. 404 for a path over TCP, unless the node was started with that path: other paths reveal
    /// the disk.
    pub(super) fn spec(&self, model: &str) -> Result<ModelSpec, ApiError> {
        self.admit(ModelSpec::new(model))
    }

    /// Returns `spec` if the caller may use its models. A path of a model that the node was started with becomes the
    /// name that the user wrote.
    ///
    /// # Errors
    /// As [`spec`](Self::spec).
    pub(super) fn admit(&self, spec: ModelSpec) -> Result<ModelSpec, ApiError> {
        let model = self.admit_name("model", spec.model)?;
        let draft = spec.draft.map(|draft| {
            let named = ModelSpec::new(draft);
            Ok::<_, ApiError>(ModelSpec { model: self.admit_name("draft", named.model)?, ..named }.to_string())
        });
        Ok(ModelSpec { model, draft: draft.transpose()?, ..spec })
    }

    fn admit_name(&self, field: &'static str, model: String) -> Result<String, ApiError> {
        if model.is_empty() {
            return Err(ApiError::bad_value(field, "is empty"));
        }
        if let Some(name) = self.named.find(&model) {
            return Ok(name.clone());
        }
        match self.caller == Caller::Network && ModelName::parse(&model).is_path() {
            true => Err(ApiError::unknown_model(&model)),
            false => Ok(model),
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
