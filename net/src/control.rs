//! The control stream: ractor_cluster's bytes over QUIC, checked frame by frame before ractor_cluster reads them.
//!
//! ractor_cluster trusts its peers too far: any member may claim any name, advertise actors and groups without end, and
//! fill mailboxes. So a filter forwards only the few kinds of frames that an honest member sends:
//! ```text
//! QUIC stream ─► Filter (length, kind, claimed name, permits, pace) ─► pipe ─► ractor_cluster's session
//! ```
//! The frames are ractor_cluster 0.16's: a length (8, big-endian) and a protobuf `NetworkMessage`
//! (`meta.proto`, `auth.proto` and `control.proto` of that crate).

use crate::backlog::{Emptying, Inbox};
use crate::identity::NodeId;
use ractor_cluster::{BoxRead, BoxWrite, ClusterBidiStream};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::Instant;

/// The longest frame, in bytes: the desired list of a large cluster stays far below.
pub const CONTROL_FRAME_BYTES_MAX: u64 = 4 << 20;
/// The most session frames in one burst: opening a session takes a dozen.
const SESSION_FRAMES_MAX: u32 = 64;
/// One more session frame is allowed in each interval: an honest member pings at most once a second and answers pings.
const SESSION_FRAMES_EVERY: Duration = Duration::from_millis(250);
/// The most actors that a peer may advertise: an honest member advertises one, once a session.
const ACTORS_MAX: usize = 4;
/// The longest body of a session's control message, in bytes: an honest member's is short.
const ACTOR_FRAME_BYTES_MAX: usize = 512;

/// A member's name in ractor_cluster, both before the `@` and behind it.
pub fn cluster_name(id: NodeId) -> String {
    id.to_string()
}

/// The control stream of one peer, as ractor_cluster uses it.
pub struct ControlStream {
    pub(crate) peer: NodeId,
    pub(crate) session: u64,
    pub(crate) reader: DuplexStream,
    pub(crate) writer: Emptying<quinn::SendStream>,
}

impl std::fmt::Debug for ControlStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ControlStream({:?})", self.peer)
    }
}

/// The label of a session over this network; a session with another label does not come from this network.
pub fn session_label(peer: NodeId, session: u64) -> String {
    format!("quic/{peer}/{session}")
}

impl ClusterBidiStream for ControlStream {
    fn split(self: Box<Self>) -> (BoxRead, BoxWrite) {
        (Box::new(self.reader), Box::new(self.writer))
    }

    fn peer_label(&self) -> Option<String> {
        Some(session_label(self.peer, self.session))
    }
}

/// Why a peer's control stream was closed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FilterError {
    #[error("a control frame has {bytes} bytes; at most {CONTROL_FRAME_BYTES_MAX} are allowed")]
    TooLong { bytes: u64 },
    #[error("the peer claims the name `{claimed}`, which its certificate does not have")]
    WrongName { claimed: String },
    #[error("the peer sent {what}")]
    Unexpected { what: &'static str },
    #[error("the stream ended: {0}")]
    Io(#[from] std::io::Error),
}

/// Forwards the frames of `peer`, until the stream ends or a frame fails the check.
pub(crate) async fn filter(
    mut from: impl AsyncRead + Unpin,
    mut to: DuplexStream,
    peer: NodeId,
    inbox: Inbox,
) -> Result<(), FilterError> {
    let mut frame = Vec::new();
    let mut actors = 0;
    let mut pace = Pace::new(Instant::now());
    loop {
        let mut length = [0; 8];
        from.read_exact(&mut length).await?;
        let bytes = u64::from_be_bytes(length);
        if bytes > CONTROL_FRAME_BYTES_MAX {
            return Err(FilterError::TooLong { bytes });
        }
        frame.clear();
        (&mut from).take(bytes).read_to_end(&mut frame).await?;
        if frame.len() as u64 != bytes {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        }
        match check(&frame, peer, &mut actors)? {
            Kind::Message => match inbox.reserve().await {
                Some(permit) => permit.forget(),
                None => return Ok(()),
            },
            Kind::Session if !pace.allows(Instant::now()) => {
                return Err(FilterError::Unexpected { what: "too many session frames at once" });
            }
            Kind::Session => {}
        }
        to.write_all(&length).await?;
        to.write_all(&frame).await?;
    }
}

/// The rate limit for session frames: ractor_cluster puts its answers into an unbounded queue.
#[derive(Debug)]
struct Pace {
    left: u32,
    counted: Instant,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { left: SESSION_FRAMES_MAX, counted: now }
    }

    fn allows(&mut self, now: Instant) -> bool {
        let more = now.duration_since(self.counted).as_millis() / SESSION_FRAMES_EVERY.as_millis();
        let more = u32::try_from(more).unwrap_or(u32::MAX);
        if more > 0 {
            self.left = self.left.saturating_add(more).min(SESSION_FRAMES_MAX);
            self.counted = now;
        }
        let is_allowed = self.left > 0;
        self.left = self.left.saturating_sub(1);
        is_allowed
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A message between actors, for this node's control actor.
    Message,
    /// A frame for ractor_cluster's session.
    Session,
}

/// Checks a `NetworkMessage`: field 1 authentication, 2 a message between actors, 3 control.
fn check(frame: &[u8], peer: NodeId, actors: &mut usize) -> Result<Kind, FilterError> {
    let Some((field, body)) = only_field(frame) else {
        return Err(FilterError::Unexpected { what: "a malformed frame" });
    };
    match field {
        1 => check_names(body, peer).map(|()| Kind::Session),
        2 => Ok(Kind::Message),
        3 => check_control(body, actors).map(|()| Kind::Session),
        _ => Err(FilterError::Unexpected { what: "a frame of unknown kind" }),
    }
}

/// Checks an `AuthenticationMessage`: 1 from the dialler, 4 from the listener, each with the name in field 1.
fn check_names(body: &[u8], peer: NodeId) -> Result<(), FilterError> {
    let Some((field, message)) = only_field(body) else {
        return Err(FilterError::Unexpected { what: "a malformed authentication message" });
    };
    if field != 1 && field != 4 {
        return Ok(());
    }
    let name = cluster_name(peer);
    let expected = format!("{name}@{name}");
    // Protobuf uses the last of several names, so every one must be right.
    let claimed: Vec<&[u8]> = Fields(message).filter_map(|(field, body)| (field == 1).then_some(body)).collect();
    match claimed.iter().find(|claimed| **claimed != expected.as_bytes()) {
        None if !claimed.is_empty() => Ok(()),
        wrong => {
            let claimed = wrong.map(|claimed| String::from_utf8_lossy(&claimed[..claimed.len().min(80)]).into_owned());
            Err(FilterError::WrongName { claimed: claimed.unwrap_or_default() })
        }
    }
}

/// Checks a `ControlMessage`: an honest member sends 1 spawn, 2 terminate, 3 ping, 4 pong and 9 ready.
fn check_control(body: &[u8], actors: &mut usize) -> Result<(), FilterError> {
    match only_field(body) {
        Some((1, message)) => {
            *actors += 1;
            match *actors > ACTORS_MAX || message.len() > ACTOR_FRAME_BYTES_MAX {
                true => Err(FilterError::Unexpected { what: "too many actors, or one with too long a message" }),
                false => Ok(()),
            }
        }
        Some((2..=4 | 9, message)) if message.len() <= ACTOR_FRAME_BYTES_MAX => Ok(()),
        _ => Err(FilterError::Unexpected { what: "an unexpected control message" }),
    }
}

/// The length-delimited field of a message that has exactly one.
fn only_field(message: &[u8]) -> Option<(u64, &[u8])> {
    let mut fields = Fields(message);
    let field = fields.next()?;
    (fields.next().is_none() && fields.0.is_empty()).then_some(field)
}

/// The length-delimited fields of a protobuf message; skips other fields, and ends where the message is malformed.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, bytes: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(bytes).ok()?)?;
        self.0 = rest;
        Some(taken)
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = (u64, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let tag = self.varint()?;
            match tag & 7 {
                0 => drop(self.varint()?),
                1 => drop(self.take(8)?),
                2 => {
                    let bytes = self.varint()?;
                    return Some((tag >> 3, self.take(bytes)?));
                }
                5 => drop(self.take(4)?),
                _ => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Identity;
    use crate::backlog::MESSAGES_MAX;
    use proptest::prelude::*;

    fn field(number: u8, body: &[u8]) -> Vec<u8> {
        assert!(body.len() < 128);
        [&[number << 3 | 2, body.len() as u8], body].concat()
    }

    fn id() -> NodeId {
        Identity::ephemeral().expect("random bytes").node_id()
    }

    #[test]
    fn a_claimed_name_must_match_the_certificate() {
        let (peer, other) = (id(), id());
        let long = |number: u8, body: &[u8]| {
            [&[number << 3 | 2, 0x80 | (body.len() & 0x7f) as u8, (body.len() >> 7) as u8], body].concat()
        };
        let claim = |id: NodeId, number: u8| {
            let name = cluster_name(id);
            long(1, &long(number, &long(1, format!("{name}@{name}").as_bytes())))
        };
        for number in [1, 4] {
            assert_eq!(check(&claim(peer, number), peer, &mut 0).ok(), Some(Kind::Session));
            assert!(matches!(check(&claim(other, number), peer, &mut 0), Err(FilterError::WrongName { .. })));
        }
        assert!(matches!(check(&field(1, &field(1, &[])), peer, &mut 0), Err(FilterError::WrongName { .. })));
        // Two names, the right one first.
        let two = [claim(peer, 1), claim(other, 1)].concat();
        assert!(check(&two, peer, &mut 0).is_err());
    }

    #[test]
    fn only_messages_of_an_honest_member_pass() {
        let peer = id();
        assert_eq!(check(&field(2, &[1, 2, 3]), peer, &mut 0).ok(), Some(Kind::Message));
        for number in 1..=12 {
            let passes = check(&field(3, &field(number, &[])), peer, &mut 0).is_ok();
            assert_eq!(passes, [1, 2, 3, 4, 9].contains(&number), "{number}");
        }
        let (spawn, mut actors) = (field(3, &field(1, &[8, 1])), 0);
        let passed = (0..20).filter(|_| check(&spawn, peer, &mut actors).is_ok()).count();
        assert_eq!(passed, ACTORS_MAX);
        assert!(check(&[], peer, &mut 0).is_err());
    }

    /// The filter stops reading from a peer whose messages are not handled.
    #[tokio::test]
    async fn unhandled_messages_are_bounded() {
        let (mut peer, reader) = tokio::io::duplex(1 << 20);
        let (to, mut pipe) = tokio::io::duplex(1 << 20);
        let inbox = Inbox::new();
        let filter = tokio::spawn(filter(reader, to, id(), inbox.clone()));
        let frame = field(2, &[7]);
        for _ in 0..MESSAGES_MAX + 10 {
            peer.write_all(&(frame.len() as u64).to_be_bytes()).await.expect("room");
            peer.write_all(&frame).await.expect("room");
        }
        let mut passed = vec![0; (8 + frame.len()) * MESSAGES_MAX];
        pipe.read_exact(&mut passed).await.expect("one message per permit");
        let further = tokio::time::timeout(std::time::Duration::from_millis(50), pipe.read_u8()).await;
        assert!(further.is_err(), "no permit, no message");
        drop(inbox.message());
        pipe.read_u8().await.expect("one more");
        filter.abort();
    }

    /// A flood of session frames exceeds the rate limit; pings at a member's rate always pass.
    #[test]
    fn a_flood_of_session_frames_exceeds_the_rate_limit() {
        let begun = Instant::now();
        let mut honest = Pace::new(begun);
        assert!((0..10_000_u32).all(|second| honest.allows(begun + Duration::from_secs(1) * second)));
        let mut flood = Pace::new(begun);
        let passed = (0..10_000_u32).filter(|frame| flood.allows(begun + Duration::from_millis(1) * *frame)).count();
        assert!((64..=64 + 40).contains(&passed), "{passed}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn arbitrary_frames_never_panic(frame in prop::collection::vec(any::<u8>(), 0..60), wrap in 0_u8..4) {
            let frame = if wrap == 0 { frame } else { field(wrap, &frame) };
            let _ = check(&frame, NodeId::of_key(&[1; 32]), &mut 0);
        }
    }
}
