//! The registry of models whose headers are on this machine, with all or a part of their weights.
//!
//! A node serves the models of its catalogue and models folders, and the models that were requested on this node, by
//! name. It never serves a path that another node chooses.

use super::config::ModelsConfig;
use super::hashes::{Hash, PieceHasher, Reading, id_of, version};
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
    /// The hashes of its pieces, and the version of the files that were hashed.
    Whole {
        hashes: Arc<Vec<Hash>>,
        version: Hash,
    },
    Part(Arc<PartialCopy>),
}

impl RegisteredModel {
    /// Creates the entry of a model with all its files. Hashes them, unless their hashes are kept in the models folder
    /// `models`.
    fn whole(files: ModelFiles, hasher: &PieceHasher, models: Option<&Path>) -> Result<(Self, Reading), ModelError> {
        let pieces = Arc::new(Pieces::of(&files)?);
        let version = version(&pieces)?;
        let (hashes, reading) = hasher.hashes(&pieces, models)?;
        let id = id_of(&pieces, &hashes)?;
        Ok((Self { id, files: Arc::new(files), pieces, content: Content::Whole { hashes, version } }, reading))
    }

    /// Opens the model in the folder of a partial copy.
    pub(super) fn part(folder: &Path) -> Result<Self, ModelError> {
        let files = partial::open_model(folder)?;
        let pieces = Arc::new(Pieces::of(&files)?);
        let copy = Arc::new(PartialCopy::open(folder, Arc::clone(&pieces))?);
        let id = id_of(&pieces, copy.hashes())?;
        Ok(Self { id, files: Arc::new(files), pieces, content: Content::Part(copy) })
    }

    /// Whether the files have changed since they were hashed.
    fn is_stale(&self) -> bool {
        match &self.content {
            Content::Whole { version: hashed, .. } => version(&self.pieces).ok().as_ref() != Some(hashed),
            // Its pieces are checked as they arrive, and nobody else writes to it.
            Content::Part(_) => false,
        }
    }

    /// The hashes of all pieces.
    pub(super) fn hashes(&self) -> &[Hash] {
        match &self.content {
            Content::Whole { hashes, .. } => hashes,
            Content::Part(copy) => copy.hashes(),
        }
    }

    /// Whether the bytes of a piece are on this machine.
    pub(super) fn has(&self, number: u32) -> bool {
        match &self.content {
            Content::Whole { .. } => (number as usize) < self.pieces.pieces.len(),
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
            let is_fresher = match (&known.content, &model.content) {
                (Content::Part(_), Content::Whole { .. }) => true,
                (Content::Whole { version: known, .. }, Content::Whole { version, .. }) => known != version,
                _ => false,
            };
            is_fresher || known.files.path != model.files.path
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

    /// Forgets a model whose files are removed.
    pub(super) fn forget(&self, id: FilesId) {
        self.index.lock().models.remove(&id);
    }

    /// Finds the model that a peer requests, if this node has any part of it. Blocks on the disk.
    ///
    /// # Errors
    /// The model's files cannot be read, or have changed since they were hashed.
    pub(super) fn look_up(
        &self,
        config: &ModelsConfig,
        request: &WeightsRequest,
    ) -> Result<Option<Arc<RegisteredModel>>, ModelError> {
        let known = request.files.or_else(|| self.index.lock().names.get(&request.model).copied());
        if let Some(model) = known.and_then(|id| self.find(id)) {
            if model.is_stale() {
                self.forget(model.id);
                return Err(ModelError::Stale { path: model.files.path.clone() });
            }
            return Ok(Some(model));
        }
        let copied = request.files.zip(config.folders.first()).map(|(id, models)| partial::folder(models, id));
        let copied = copied.filter(|folder| folder.exists()).map(|folder| RegisteredModel::part(&folder));
        if let Some(Ok(model)) = copied {
            return Ok(Some(self.insert(&request.model, model)));
        }
        let Some(path) = ModelName::parse(&request.model).find_in(&config.folders) else { return Ok(None) };
        let (model, _) = self.open(config, &path)?;
        let model = self.insert(&request.model, model);
        Ok(Some(model).filter(|model| request.files.is_none_or(|id| id == model.id)))
    }
}
