//! Fetches from honest and faulty peers: the bytes are checked, right pieces stay, and missing pieces are requested
//! from the next peer.

use super::*;
use crate::models::files::read_piece;
use crate::models::{ModelRegistry, ModelRequest, ModelsConfig, serve};
use crate::transport::callback::EventCallback;
use exo_engines::model::ModelFiles;
use exo_net::{ClusterSecret, Network, NetworkConfig, NetworkEvent, Peer};
use parking_lot::Mutex;
use std::net::SocketAddr;
use tokio::sync::mpsc;

/// The behaviour of a peer that serves a model's bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Giver {
    Honest,
    /// Sends each piece with one wrong byte.
    WrongPieces,
    /// Sends hashes that match no piece.
    WrongHashes,
    /// Sends two pieces, then ends the stream.
    GoesAway,
    /// Says that it cannot send the pieces.
    Refuses,
    /// Answers that it has no such model.
    HasNothing,
    /// Sends unrelated answers.
    Nonsense,
}

/// The queries that each giver received, in order.
type Asked = Arc<Mutex<Vec<(Giver, WeightsQuery)>>>;

fn network(secret: &ClusterSecret, peers: Vec<SocketAddr>) -> (Network, mpsc::Receiver<NetworkEvent>) {
    let config = NetworkConfig::loopback(secret.clone(), peers).expect("random bytes");
    Network::start(config).expect("it listens")
}

async fn up(events: &mut mpsc::Receiver<NetworkEvent>) -> Box<Peer> {
    loop {
        let event = tokio::time::timeout(Duration::from_secs(10), events.recv()).await.expect("in time");
        if let NetworkEvent::PeerUp(peer) = event.expect("the network runs") {
            return peer;
        }
    }
}

/// A models folder with the model `tiny`.
fn with_model() -> tempfile::TempDir {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engines/tests/fixtures/llama");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let model = folder.path().join("tiny");
    std::fs::create_dir(&model).expect("a folder");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture.join(file), model.join(file)).expect("copied");
    }
    std::fs::write(model.join("tokenizer.json"), "{}").expect("written");
    folder
}

async fn answer_all(giver: Giver, peer: Box<Peer>, models: Arc<ModelsConfig>, asked: Asked) {
    let registry = ModelRegistry::default();
    while let Ok(mut stream) = peer.data.accept().await {
        let hello = stream.reader.receive::<DataHello>(|_, _| Ok(())).await;
        let Ok(Some((DataHello::Weights(ask), _))) = hello else { continue };
        asked.lock().push((giver, ask.query.clone()));
        let (models, registry) = (Arc::clone(&models), registry.clone());
        tokio::spawn(async move { give(giver, models, registry, ask, stream).await });
    }
}

async fn give(
    giver: Giver,
    models: Arc<ModelsConfig>,
    registry: ModelRegistry,
    ask: WeightsRequest,
    mut stream: DataStream,
) {
    let shared = registry.open(&models, &models.folders[0].join("tiny"));
    let pieces = Arc::clone(&shared.expect("headers").0.pieces);
    let count = pieces.pieces.len();
    let writer = &mut stream.writer;
    // Sending fails if the fetch has given up this giver.
    let _ = match (giver, &ask.query) {
        (Giver::HasNothing, _) => writer.send(&WeightsResponse::Nothing, Payload::Nothing).await,
        (Giver::Nonsense, _) => writer.send(&WeightsResponse::Piece { number: 7 }, Payload::Bytes(&[7; 7])).await,
        (Giver::Refuses, WeightsQuery::Pieces(_)) => {
            let why = "tiny: the file has changed since it was hashed\u{7}".to_owned();
            writer.send(&WeightsResponse::Failed { why }, Payload::Nothing).await
        }
        (Giver::WrongHashes, WeightsQuery::Hashes) => {
            let told = [vec![7; count * size_of::<Hash>()], vec![1; count]].concat();
            writer.send(&WeightsResponse::Hashes { count: count as u32 }, Payload::Bytes(&told)).await
        }
        (Giver::WrongPieces | Giver::GoesAway, WeightsQuery::Pieces(numbers)) => {
            let given = if giver == Giver::GoesAway { 2 } else { numbers.len() };
            for &number in numbers.iter().take(given) {
                let mut bytes = read_piece(&pieces, pieces.pieces[number as usize]).expect("read");
                if giver == Giver::WrongPieces {
                    bytes[0] ^= 1;
                }
                if writer.send(&WeightsResponse::Piece { number }, Payload::Bytes(&bytes)).await.is_err() {
                    return;
                }
            }
            return;
        }
        _ => return serve::serve(models, registry, ask, stream).await,
    };
}

/// Fetches all layers from the givers, one after the other. Returns the outcome, and the queries that the givers
/// received.
async fn fetch(givers: &[Giver], into: &Path) -> (Fetched, Vec<(Giver, WeightsQuery)>) {
    let (got, asked, _) = fetch_with_reasons(givers, into).await;
    (got, asked)
}

type Fetched = Result<Option<Arc<RegisteredModel>>, ModelError>;

/// The same, with the reasons of the givers that did not give all.
async fn fetch_with_reasons(givers: &[Giver], into: &Path) -> (Fetched, Vec<(Giver, WeightsQuery)>, Vec<String>) {
    let (secret, source) = (ClusterSecret::random().expect("random bytes"), with_model());
    let (getter, mut events) = network(&secret, Vec::new());
    let address = getter.address().expect("it listens");
    let asked = Asked::default();
    let (mut peers, mut held) = (Vec::new(), Vec::new());
    for &giver in givers {
        let (network, mut of_giver) = network(&secret, vec![address]);
        let seen = up(&mut events).await;
        peers.push(WeightsPeer { id: seen.id, name: seen.name.clone(), data: seen.data.clone() });
        let answering = answer_all(
            giver,
            up(&mut of_giver).await,
            Arc::new(ModelsConfig::of_folder(source.path())),
            Arc::clone(&asked),
        );
        held.push((network, of_giver, seen, tokio::spawn(answering)));
    }
    let layers = ModelFiles::open(&source.path().join("tiny")).expect("a model").architecture.layers.len();
    let request = ModelRequest { model: "tiny".to_owned(), files: None, extent: Extent::Layers(0..layers) };
    let (config, registry, progress) =
        (Arc::new(ModelsConfig::of_folder(into)), ModelRegistry::default(), EventCallback::new(drop));
    let job = FetchJob { config, registry, request, progress, number: 1, tried: Mutex::default() };
    let got = job.fetch_from_peers(&peers).await;
    tokio::task::spawn_blocking(move || drop((getter, held))).await.expect("dropped");
    let (asked, tried) = (asked.lock().clone(), job.tried.into_inner());
    (got, asked, tried)
}

/// The numbers of the pieces that a giver was asked for.
fn pieces_of(giver: Giver, asked: &[(Giver, WeightsQuery)]) -> Vec<u32> {
    let wanted = asked.iter().filter(|(of, _)| *of == giver).filter_map(|(_, wanted)| match wanted {
        WeightsQuery::Pieces(numbers) => Some(numbers.clone()),
        _ => None,
    });
    wanted.flatten().collect()
}

/// R7.1–R7.5: whatever the first giver does, the honest giver completes the model to the byte, and right pieces of the
/// first are not requested again.
#[tokio::test(flavor = "multi_thread")]
async fn an_honest_peer_completes_a_fetch_from_a_faulty_one() {
    let source = with_model();
    let original = std::fs::read(source.path().join("tiny/model.safetensors")).expect("read");
    let firsts = [Giver::WrongPieces, Giver::WrongHashes, Giver::GoesAway, Giver::HasNothing, Giver::Nonsense];
    for first in firsts {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (got, asked) = fetch(&[first, Giver::Honest], folder.path()).await;
        let shared = got.expect("no error of ours").unwrap_or_else(|| panic!("{first:?}: the model is incomplete"));
        let copied = std::fs::read(shared.files.path.join("model.safetensors")).expect("read");
        assert!(copied == original, "{first:?}");
        let (of_first, of_honest) = (pieces_of(first, &asked), pieces_of(Giver::Honest, &asked));
        let all = shared.pieces.pieces.len();
        let kept = if first == Giver::GoesAway { 2 } else { 0 };
        assert_eq!(of_honest.len(), all - kept, "{first:?}: {of_first:?}, then {of_honest:?}");
    }
}

/// R7.1–R7.5, R8.1–R8.5: after an incomplete fetch the received pieces stay, and a later fetch requests only the rest.
/// A damaged copy is fetched again.
#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_fetch_continues_and_a_damaged_copy_is_fetched_again() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (got, _) = fetch(&[Giver::GoesAway], folder.path()).await;
    assert!(got.expect("no error of ours").is_none(), "the giver sends only two pieces");
    let (got, asked) = fetch(&[Giver::Honest], folder.path()).await;
    let shared = got.expect("no error of ours").expect("the model is complete");
    assert_eq!(pieces_of(Giver::Honest, &asked).len(), shared.pieces.pieces.len() - 2);
    let (got, asked) = fetch(&[Giver::Honest], folder.path()).await;
    assert!(got.is_ok_and(|got| got.is_some()) && pieces_of(Giver::Honest, &asked).is_empty(), "no piece is missing");
    std::fs::write(shared.files.path.join("config.json"), "nothing of use").expect("written");
    let (got, asked) = fetch(&[Giver::Honest], folder.path()).await;
    assert!(got.is_ok_and(|got| got.is_some()), "the damaged copy is fetched again");
    assert_eq!(pieces_of(Giver::Honest, &asked).len(), shared.pieces.pieces.len());
}

/// A peer that cannot give a model's bytes says why, and its reason is kept for the error that the user reads.
#[tokio::test(flavor = "multi_thread")]
async fn the_reason_of_a_peer_is_kept() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (got, _, tried) = fetch_with_reasons(&[Giver::Refuses], folder.path()).await;
    assert!(got.expect("no error of ours").is_none());
    assert!(
        matches!(&tried[..], [why] if why.ends_with(": tiny: the file has changed since it was hashed")),
        "{tried:?}"
    );
}

/// A file that has changed since it was hashed is not given under its old id: who asks is told, and may ask again.
#[test]
fn a_changed_file_is_not_given_under_its_old_id() {
    let source = with_model();
    let (config, registry) = (ModelsConfig::of_folder(source.path()), ModelRegistry::default());
    let ask = WeightsRequest { model: "tiny".to_owned(), files: None, query: WeightsQuery::Outline };
    let before = registry.look_up(&config, &ask).expect("readable").expect("it is there");
    let path = source.path().join("tiny/model.safetensors");
    let mut bytes = std::fs::read(&path).expect("readable");
    *bytes.last_mut().expect("a byte") ^= 1;
    std::fs::write(&path, bytes).expect("written");
    assert!(matches!(registry.look_up(&config, &ask), Err(ModelError::Stale { .. })));
    let after = registry.look_up(&config, &ask).expect("readable").expect("it is there");
    assert_ne!(after.id, before.id);
}
