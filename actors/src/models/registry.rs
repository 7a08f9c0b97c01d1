//! The registry of models whose headers are on this machine, with all or a part of their weights.
//!
//! A node serves the models of its catalogue and models folders, and the models that were requested on this node, by
//! name. It never serves a path that another node chooses.

use super::config::ModelsConfig;
use super::hashes::{Hash, PieceHasher, Reading, id_of};
use super::partial::{self, PartialCopy};
use super::{ModelError, ModelName};
use crate::core::spec::FilesId;
use crate::transport::protocol::WeightsRequest;
use exo_engines::model::{ModelFiles, Pieces};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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
    Whole(Arc<Vec<Hash>>),
    Part(Arc<PartialCopy>),
}

impl RegisteredModel {
    /// Creates the entry of a model with all its files. Hashes them, unless their hashes are kept in the models folder
    /// `models`.
    fn whole(files: ModelFiles, hasher: &PieceHasher, models: Option<&Path>) -> Result<(Self, Reading), ModelError> {
        let pieces = Arc::new(Pieces::of(&files)?);
        let (hashes, reading) = hasher.hashes(&pieces, models)?;
        let id = id_of(&pieces, &hashes)?;
        Ok((Self { id, files: Arc::new(files), pieces, content: Content::Whole(hashes) }, reading))
    }

    /// Opens the model in the folder of a partial copy.
    pub(super) fn part(folder: &Path) -> Result<Self, ModelError> {
        let files = partial::open_model(folder)?;
        let pieces = Arc::new(Pieces::of(&files)?);
        let copy = Arc::new(PartialCopy::open(folder, Arc::clone(&pieces))?);
        let id = id_of(&pieces, copy.hashes())?;
        Ok(Self { id, files: Arc::new(files), pieces, content: Content::Part(copy) })
    }

    /// The hashes of all pieces.
    pub(super) fn hashes(&self) -> &[Hash] {
        match &self.content {
            Content::Whole(hashes) => hashes,
            Content::Part(copy) => copy.hashes(),
        }
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
pub(super) struct ModelRegistry {
    index: Arc<Mutex<Index>>,
    hasher: PieceHasher,
}

#[derive(Debug, Default)]
struct Index {
    models: HashMap<FilesId, Arc<RegisteredModel>>,
    names: HashMap<String, FilesId>,
}

impl ModelRegistry {
    pub(super) fn find(&self, id: FilesId) -> Option<Arc<RegisteredModel>> {
        self.index.lock().models.get(&id).cloned()
    }

    /// Opens the model of a path, with all its files, and hashes them. Blocks on the disk.
    pub(super) fn open(&self, config: &ModelsConfig, path: &Path) -> Result<(RegisteredModel, Reading), ModelError> {
        let models = config.folders.first().map(PathBuf::as_path);
        RegisteredModel::whole(ModelFiles::open(path)?, &self.hasher, models)
    }

    /// Bytes hashed so far: see [`PieceHasher::done_bytes`].
    pub(super) fn hashed_bytes(&self) -> u64 {
        self.hasher.done_bytes()
    }

    /// Registers a model, and returns its entry. A whole model replaces a partial copy.
    pub(super) fn insert(&self, name: &str, model: RegisteredModel) -> Arc<RegisteredModel> {
        let mut index = self.index.lock();
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
        let known = request.files.or_else(|| self.index.lock().names.get(&request.model).copied());
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
        match self.open(config, &path) {
            Ok((model, _)) => {
                Some(self.insert(&request.model, model)).filter(|model| request.files.is_none_or(|id| id == model.id))
            }
            Err(error) => {
                tracing::warn!(model = request.model, %error, "cannot read a model that a peer requests");
                None
            }
        }
    }
}
