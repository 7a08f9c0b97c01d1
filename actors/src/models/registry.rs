//! The registry of models whose headers are on this machine, with all or a part of their weights.
//!
//! A node serves the models of its catalogue and models folders, and the models that were requested on this node, by
//! name. It never serves a path that another node chooses.

use super::config::ModelsConfig;
use super::partial::{self, Hash, PartialCopy, id_of};
use super::{ModelError, ModelName};
use crate::core::spec::FilesId;
use crate::transport::protocol::WeightsRequest;
use exo_engines::model::{ModelFiles, Pieces};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use tokio::sync::OnceCell;

/// A model whose headers are on this machine.
#[derive(Debug)]
pub(super) struct RegisteredModel {
    pub(super) id: FilesId,
    pub(super) files: Arc<ModelFiles>,
    pub(super) pieces: Arc<Pieces>,
    pub(super) content: Content,
}

/// The part of a registered model that is on this machine.
#[derive(Debug)]
pub(super) enum Content {
    Whole(PieceHashes),
    Part(Arc<PartialCopy>),
}

/// The hashes of a whole model's pieces, computed when a peer first requests them.
#[derive(Debug, Default)]
pub(super) struct PieceHashes {
    pub(super) computed: OnceCell<Vec<Hash>>,
    /// Bytes hashed so far.
    pub(super) done_bytes: AtomicU64,
}

impl RegisteredModel {
    /// Creates the entry of a model with all its files.
    pub(super) fn whole(files: ModelFiles) -> Result<Self, ModelError> {
        let pieces = Arc::new(Pieces::of(&files)?);
        let content = Content::Whole(PieceHashes::default());
        Ok(Self { id: id_of(&pieces)?, files: Arc::new(files), pieces, content })
    }

    /// Opens the model in the folder of a partial copy.
    pub(super) fn part(folder: &Path) -> Result<Self, ModelError> {
        let files = partial::open_model(folder)?;
        let pieces = Arc::new(Pieces::of(&files)?);
        let content = Content::Part(Arc::new(PartialCopy::open(folder, Arc::clone(&pieces))?));
        Ok(Self { id: id_of(&pieces)?, files: Arc::new(files), pieces, content })
    }

    /// Whether the bytes of a piece are on this machine.
    pub(super) fn has(&self, number: u32) -> bool {
        match &self.content {
            Content::Whole(_) => (number as usize) < self.pieces.pieces.len(),
            Content::Part(copy) => copy.has(number),
        }
    }
}

/// The registered models, at most as many as this machine's disks hold. Clones share one index.
#[derive(Debug, Clone, Default)]
pub(super) struct ModelRegistry(Arc<Mutex<Index>>);

#[derive(Debug, Default)]
struct Index {
    models: HashMap<FilesId, Arc<RegisteredModel>>,
    names: HashMap<String, FilesId>,
}

impl ModelRegistry {
    pub(super) fn find(&self, id: FilesId) -> Option<Arc<RegisteredModel>> {
        self.0.lock().models.get(&id).cloned()
    }

    /// Registers a model, and returns its entry. A whole model replaces a partial copy.
    pub(super) fn insert(&self, name: &str, model: RegisteredModel) -> Arc<RegisteredModel> {
        let mut index = self.0.lock();
        index.names.insert(name.to_owned(), model.id);
        let is_new = |known: &Arc<RegisteredModel>| {
            matches!((&known.content, &model.content), (Content::Part(_), Content::Whole(_)))
                || known.files.path != model.files.path
        };
        match index.models.get(&model.id) {
            Some(known) if !is_new(known) => Arc::clone(known),
            _ => {
                let model = Arc::new(model);
                index.models.insert(model.id, Arc::clone(&model));
                model
            }
        }
    }

    /// Finds the model that a peer requests, if this node has any part of it. Blocks on the disk.
    pub(super) fn look_up(&self, config: &ModelsConfig, request: &WeightsRequest) -> Option<Arc<RegisteredModel>> {
        let known = request.files.or_else(|| self.0.lock().names.get(&request.model).copied());
        if let Some(model) = known.and_then(|id| self.find(id)) {
            return Some(model);
        }
        let copied = request.files.zip(config.folders.first()).map(|(id, models)| partial::folder(models, id));
        let copied = copied.filter(|folder| folder.exists()).map(|folder| RegisteredModel::part(&folder));
        if let Some(Ok(model)) = copied {
            return Some(self.insert(&request.model, model));
        }
        let name = ModelName::parse(&request.model);
        let path = name.find_in(&config.folders)?;
        match ModelFiles::open(&path).map_err(Into::into).and_then(RegisteredModel::whole) {
            Ok(model) => {
                Some(self.insert(&request.model, model)).filter(|model| request.files.is_none_or(|id| id == model.id))
            }
            Err(error) => {
                tracing::warn!(model = request.model, %error, "cannot read a model that a peer requests");
                None
            }
        }
    }
}
