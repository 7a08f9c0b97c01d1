//! The channel between a node and its worker: messages over a socket, long rows through shared memory.
//!
//! ```text
//! message length (u32) │ where the values are (u8) │ number of values (u64) │ message │ values, if they are here
//! ```
//! Numbers are in the machine's byte order. The other side may be broken: lengths are checked before memory is taken.

use super::message::{MESSAGE_BYTES_MAX, MessageError, decode, encode};
use super::shared_memory::SharedMemory;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// The most bytes of values that follow their message on the socket although there is shared memory: so few take no
/// longer than two more calls.
const IN_LINE_BYTES_MAX: usize = 16 << 10;
/// Values of hidden rows or logits that a side takes without knowing the number beforehand: 1 GiB.
pub(super) const VALUES_MAX: usize = 256 << 20;

const HEADER_BYTES: usize = 13;
const ON_SOCKET: u8 = 0;
const IN_SHARED_MEMORY: u8 = 1;

/// Why nothing was sent or received.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChannelError {
    #[error("the channel to the engine's process broke: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("a message has {0} bytes; at most {MESSAGE_BYTES_MAX} are allowed")]
    MessageTooLong(usize),
    #[error("{got} values instead of at most {max}")]
    TooManyValues { got: u64, max: usize },
    #[error("values are neither on the socket nor in shared memory")]
    NoPlace,
}

#[derive(Debug)]
pub(super) struct Channel {
    socket: UnixStream,
    memory: Option<SharedMemory>,
    buffer: Vec<u8>,
}

impl Channel {
    pub(super) fn new(socket: UnixStream, memory: Option<SharedMemory>) -> Self {
        Self { socket, memory, buffer: Vec::new() }
    }

    /// Sets how long a side waits for a message; `None`: for ever.
    pub(super) fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        self.socket.set_read_timeout(patience)
    }

    pub(super) fn send<T: Serialize>(&mut self, message: &T, values: &[f32]) -> Result<(), ChannelError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let memory = self.memory.as_ref();
        let memory = memory.filter(|memory| bytes.len() > IN_LINE_BYTES_MAX && memory.has_room(bytes.len()));
        self.buffer.clear();
        self.buffer.resize(HEADER_BYTES, 0);
        encode(message, &mut self.buffer)?;
        let length = self.buffer.len() - HEADER_BYTES;
        if length > MESSAGE_BYTES_MAX {
            return Err(ChannelError::MessageTooLong(length));
        }
        self.buffer[..4].copy_from_slice(&(length as u32).to_ne_bytes());
        self.buffer[4] = if memory.is_some() { IN_SHARED_MEMORY } else { ON_SOCKET };
        self.buffer[5..HEADER_BYTES].copy_from_slice(&(values.len() as u64).to_ne_bytes());
        match memory {
            Some(memory) => {
                memory.write(bytes)?;
                self.socket.write_all(&self.buffer)?;
            }
            None if bytes.len() <= IN_LINE_BYTES_MAX => {
                self.buffer.extend_from_slice(bytes);
                self.socket.write_all(&self.buffer)?;
            }
            None => {
                self.socket.write_all(&self.buffer)?;
                self.socket.write_all(bytes)?;
            }
        }
        Ok(())
    }

    /// Waits for a message and its values, at most `values_max`.
    pub(super) fn receive<T: DeserializeOwned>(&mut self, values_max: usize) -> Result<(T, Vec<f32>), ChannelError> {
        let mut header = [0; HEADER_BYTES];
        self.socket.read_exact(&mut header)?;
        let [a, b, c, d, place, count @ ..] = header;
        let (length, count) = (u32::from_ne_bytes([a, b, c, d]) as usize, u64::from_ne_bytes(count));
        if length > MESSAGE_BYTES_MAX {
            return Err(ChannelError::MessageTooLong(length));
        }
        let values_count = usize::try_from(count).ok().filter(|&count| count <= values_max);
        let Some(values_count) = values_count else {
            return Err(ChannelError::TooManyValues { got: count, max: values_max });
        };
        self.buffer.resize(length, 0);
        self.socket.read_exact(&mut self.buffer)?;
        let message = decode(&self.buffer)?;
        let mut values = vec![0.0_f32; values_count];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        match (place, &self.memory) {
            (ON_SOCKET, _) => self.socket.read_exact(bytes)?,
            (IN_SHARED_MEMORY, Some(memory)) if memory.has_room(bytes.len()) => memory.read(bytes)?,
            _ => return Err(ChannelError::NoPlace),
        }
        Ok((message, values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pair() -> (Channel, Channel) {
        let (a, b) = UnixStream::pair().expect("sockets");
        let memory = SharedMemory::create();
        let other = memory.as_ref().map(|memory| memory.descriptor().expect("a descriptor"));
        let other = other.and_then(SharedMemory::received);
        assert_eq!(memory.is_some(), other.is_some());
        (Channel::new(a, memory), Channel::new(b, other))
    }

    /// Values arrive to the bit, whether they are few, many, or too many for the shared memory.
    #[test]
    fn messages_and_values_arrive() {
        let (mut node, mut worker) = pair();
        for count in [0, 1, 5000, 1 << 20, 20 << 20] {
            let values: Vec<f32> = (0..count).map(|i| f32::from_bits(0x3f80_0000 + i)).collect();
            let (got, back) = std::thread::scope(|scope| {
                let echo = scope.spawn(|| {
                    let (message, values) = worker.receive::<String>(count as usize).expect("received");
                    worker.send(&message, &values).expect("sent");
                });
                node.send(&format!("{count} values"), &values).expect("sent");
                let got = node.receive::<String>(count as usize).expect("received");
                echo.join().expect("no panic");
                got
            });
            assert_eq!(got, format!("{count} values"));
            assert!(back == values, "{count} values");
        }
    }

    #[test]
    fn a_message_that_is_cut_off_is_an_error() {
        let (mut node, worker) = pair();
        let mut bytes = Vec::from(100_u32.to_ne_bytes());
        bytes.extend([ON_SOCKET; 20]);
        let mut socket = worker.socket;
        socket.write_all(&bytes).expect("sent");
        drop(socket);
        assert!(matches!(node.receive::<String>(0), Err(ChannelError::Io(_))));
    }

    proptest! {
        /// Whatever a broken worker sends, the node gets an error or a message, and takes no more memory than allowed.
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let (mut node, worker) = pair();
            let mut socket = worker.socket;
            socket.write_all(&bytes).expect("sent");
            drop(socket);
            let _ = node.receive::<String>(4);
        }
    }
}
