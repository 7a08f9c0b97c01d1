//! Serving a model's bytes to other nodes: headers, hashes of pieces, pieces.

use super::ModelError;
use super::config::ModelsConfig;
use super::files::{blocking, read_at, read_piece};
use super::registry::{ModelRegistry, RegisteredModel};
use crate::transport::protocol::{OutlinedFile, WeightsQuery, WeightsRequest, WeightsResponse};
use exo_engines::model::TokenizerSource;
use exo_net::{DataStream, FrameError, Payload, Priority};
use std::sync::Arc;
use std::time::Duration;

/// How often a peer that waits for hashes receives a progress report.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);
/// The most time that a peer may take to read a frame: a piece at half a megabit a second. A slower peer would delay
/// others.
const TAKEN_WITHIN: Duration = Duration::from_secs(120);
/// The most bytes of headers in one frame.
const CHUNK_BYTES: u64 = 1 << 20;

/// Answers a peer's request for a model's bytes.
pub(super) async fn serve(
    config: Arc<ModelsConfig>,
    registry: ModelRegistry,
    request: WeightsRequest,
    mut stream: DataStream,
) {
    stream.set_priority(Priority::Low);
    let (model, query) = (request.model.clone(), request.query.clone());
    let hasher = registry.clone();
    let looking = blocking(move || registry.look_up(&config, &request));
    let served = match found(looking, &hasher, &mut stream).await {
        Ok(Some(found)) => match query {
            WeightsQuery::Outline => send_outline(&found, &mut stream).await,
            WeightsQuery::Hashes => send_hashes(&found, &mut stream).await,
            WeightsQuery::Pieces(numbers) => send_pieces(&found, &numbers, &mut stream).await,
        },
        Ok(None) => send_nothing(&mut stream).await,
        Err(error) => Err(error),
    };
    if let Err(error) = served {
        if let ServeError::Model(error) = &error {
            let failed = WeightsResponse::Failed { why: error.to_string() };
            // The peer may have gone.
            let _ = send(&mut stream, &failed, Payload::Nothing).await;
        }
        tracing::info!(model, %error, "a model's bytes could not be sent to a peer");
    }
}

/// Waits for a model that may have to be hashed first. Tells the peer how that goes.
async fn found(
    looking: impl Future<Output = Result<Option<Arc<RegisteredModel>>, ModelError>>,
    registry: &ModelRegistry,
    stream: &mut DataStream,
) -> Result<Option<Arc<RegisteredModel>>, ServeError> {
    tokio::pin!(looking);
    loop {
        tokio::select! {
            found = &mut looking => return Ok(found?),
            () = tokio::time::sleep(PROGRESS_EVERY) => {
                let preparing = WeightsResponse::Preparing { done_bytes: registry.hashed_bytes() };
                send(stream, &preparing, Payload::Nothing).await?;
            }
        }
    }
}

/// The reason why a model's bytes could not be sent to a peer.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the peer did not read a frame in {} s", TAKEN_WITHIN.as_secs())]
    NotTaken,
}

/// Sends a frame, within [`TAKEN_WITHIN`].
async fn send(stream: &mut DataStream, response: &WeightsResponse, payload: Payload<'_>) -> Result<(), ServeError> {
    let sending = stream.writer.send(response, payload);
    Ok(tokio::time::timeout(TAKEN_WITHIN, sending).await.map_err(|_| ServeError::NotTaken)??)
}

async fn send_nothing(stream: &mut DataStream) -> Result<(), ServeError> {
    send(stream, &WeightsResponse::Nothing, Payload::Nothing).await
}

async fn send_outline(model: &Arc<RegisteredModel>, stream: &mut DataStream) -> Result<(), ServeError> {
    let files = model.pieces.files.iter().map(|file| OutlinedFile {
        name: file.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        length_bytes: file.length_bytes,
        outline_bytes: file.outline_bytes(),
    });
    let is_folder = matches!(model.files.tokenizer, TokenizerSource::Folder(_));
    let outline = WeightsResponse::Outline { id: model.id, is_folder, files: files.collect() };
    send(stream, &outline, Payload::Bytes(model.hashes().as_flattened())).await?;
    for (number, file) in model.pieces.files.iter().enumerate() {
        for offset_bytes in (0..file.outline_bytes()).step_by(CHUNK_BYTES as usize) {
            let length = CHUNK_BYTES.min(file.outline_bytes() - offset_bytes) as usize;
            let path = file.path.clone();
            let bytes = blocking(move || read_at(&path, offset_bytes, length)).await?;
            let header = WeightsResponse::OutlineBytes { file: number as u32, offset_bytes };
            send(stream, &header, Payload::Bytes(&bytes)).await?;
        }
    }
    Ok(())
}

async fn send_hashes(model: &Arc<RegisteredModel>, stream: &mut DataStream) -> Result<(), ServeError> {
    let hashes = model.hashes();
    let have: Vec<u8> = (0..hashes.len() as u32).map(|number| u8::from(model.has(number))).collect();
    let count = hashes.len() as u32;
    send(stream, &WeightsResponse::Hashes { count }, Payload::Bytes(&[hashes.as_flattened(), &have].concat())).await
}

async fn send_pieces(model: &Arc<RegisteredModel>, numbers: &[u32], stream: &mut DataStream) -> Result<(), ServeError> {
    for &number in numbers.iter().filter(|&&number| model.has(number)) {
        let (pieces, piece) = (Arc::clone(&model.pieces), model.pieces.pieces[number as usize]);
        let bytes = blocking(move || read_piece(&pieces, piece)).await?;
        send(stream, &WeightsResponse::Piece { number }, Payload::Bytes(&bytes)).await?;
    }
    Ok(())
}
