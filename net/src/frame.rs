//! Frames on a data stream: a header and a payload.
//!
//! ```text
//! header length (4, little-endian) │ kind of payload (1) │ zero (3) │ payload length (8) │ header (bincode) │ payload
//! ```
//! Kinds: 0 nothing, 1 f32, 2 f16, 3 bf16 (little-endian numbers), 4 plain bytes. Before memory for the payload is
//! allocated, the reader checks lengths against bounds, and its caller checks the announced payload against the header.
//! Numbers are read into the buffer that the engine takes.

use crate::wire::{self, VALUE_BYTES_MAX, WireError};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The longest payload, in bytes: 1,024 rows of 16,384 f32.
pub const PAYLOAD_BYTES_MAX: u64 = 64 << 20;
const PRELUDE_BYTES: usize = 16;
/// The size of the buffer for converting 16-bit floats, in numbers.
const CONVERTED_AT_ONCE: usize = 4096;

/// The type in which numbers are sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WireType {
    /// Unconverted: the receiver gets the same bits.
    #[default]
    F32,
    /// IEEE half precision: 2 bytes each; numbers that are too large for it become infinite.
    F16,
    /// bfloat16: 2 bytes each, with the range of `f32` and 8 significant bits.
    Bf16,
}

impl WireType {
    fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// The error of a text that names no wire type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is not one of f32, f16, bf16")]
pub struct UnknownWireType {
    /// The text.
    pub name: String,
}

impl std::str::FromStr for WireType {
    type Err = UnknownWireType;

    fn from_str(text: &str) -> Result<Self, UnknownWireType> {
        match text {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            "bf16" => Ok(Self::Bf16),
            other => Err(UnknownWireType { name: other.to_owned() }),
        }
    }
}

/// The payload to send behind a header.
#[derive(Debug, Clone, Copy)]
pub enum Payload<'a> {
    /// No payload.
    Nothing,
    /// Numbers, which are converted to the wire type.
    Numbers(&'a [f32], WireType),
    /// Bytes, sent unchanged.
    Bytes(&'a [u8]),
}

/// The payload that a frame announces before it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Announced {
    /// No payload.
    Nothing,
    /// Numbers of any wire type.
    Numbers {
        /// How many numbers follow.
        count: usize,
    },
    /// Bytes.
    Bytes {
        /// How many bytes follow.
        count: usize,
    },
}

/// The payload that came behind a header.
#[derive(Debug, Clone, PartialEq)]
pub enum Received {
    /// No payload.
    Nothing,
    /// Numbers, converted from the wire type.
    Numbers(Vec<f32>),
    /// Bytes.
    Bytes(Vec<u8>),
}

/// Why a frame was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The header cannot be encoded or decoded, or is too long.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The payload is longer than [`PAYLOAD_BYTES_MAX`].
    #[error("a frame announces {bytes} bytes of payload; at most {PAYLOAD_BYTES_MAX} are allowed")]
    PayloadTooLong {
        /// The payload's length in bytes.
        bytes: u64,
    },
    /// The payload's kind is unknown, its length does not match the kind, or reserved bytes are not 0.
    #[error("a frame is malformed (payload kind {kind})")]
    Malformed {
        /// The payload's kind, as sent.
        kind: u8,
    },
    /// The receiver does not accept this header with this payload.
    #[error("a frame was refused: {what}")]
    Refused {
        /// Why.
        what: String,
    },
    /// The stream failed, or ended within a frame.
    #[error("the stream ended: {0}")]
    Io(#[from] std::io::Error),
}

/// A writer of frames.
#[derive(Debug)]
pub struct FrameWriter<W> {
    stream: W,
    /// Reused, so that frames do not allocate it anew.
    buffer: Vec<u8>,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// A writer to `stream`.
    pub fn new(stream: W) -> Self {
        Self { stream, buffer: Vec::new() }
    }

    /// The underlying stream.
    pub fn stream(&mut self) -> &mut W {
        &mut self.stream
    }

    pub(crate) fn into_stream(self) -> W {
        self.stream
    }

    /// Writes a frame.
    ///
    /// # Errors
    /// [`FrameError`] where the frame is too long, or the stream has ended.
    pub async fn send<H: Serialize>(&mut self, header: &H, payload: Payload<'_>) -> Result<(), FrameError> {
        let header = wire::encode(header)?;
        let (kind, bytes) = match payload {
            Payload::Nothing => (0, 0),
            Payload::Numbers(numbers, wire_type) => (1 + wire_type as u8, numbers.len() as u64 * wire_type.bytes()),
            Payload::Bytes(bytes) => (4, bytes.len() as u64),
        };
        if bytes > PAYLOAD_BYTES_MAX {
            return Err(FrameError::PayloadTooLong { bytes });
        }
        self.buffer.clear();
        self.buffer.extend((header.len() as u32).to_le_bytes());
        self.buffer.extend([kind, 0, 0, 0]);
        self.buffer.extend(bytes.to_le_bytes());
        self.buffer.extend(&header);
        match payload {
            Payload::Nothing => {}
            Payload::Bytes(bytes) => self.buffer.extend(bytes),
            Payload::Numbers(numbers, WireType::F32) => self.buffer.extend(bytemuck::cast_slice::<f32, u8>(numbers)),
            Payload::Numbers(numbers, WireType::F16) => {
                self.buffer.extend(numbers.iter().flat_map(|&number| f16::from_f32(number).to_le_bytes()));
            }
            Payload::Numbers(numbers, WireType::Bf16) => {
                self.buffer.extend(numbers.iter().flat_map(|&number| bf16::from_f32(number).to_le_bytes()));
            }
        }
        Ok(self.stream.write_all(&self.buffer).await?)
    }
}

/// A reader of frames.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    header: Vec<u8>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// A reader of `stream`.
    pub fn new(stream: R) -> Self {
        Self { stream, header: Vec::new() }
    }

    /// The underlying stream.
    pub fn stream(&mut self) -> &mut R {
        &mut self.stream
    }

    pub(crate) fn into_stream(self) -> R {
        self.stream
    }

    /// Reads a frame; `None` where the stream has ended between two frames. Before the payload is read, `admit` gets
    /// the header and the announced payload; its error refuses the frame.
    ///
    /// Not cancel-safe: after a cancelled read the stream is unusable.
    ///
    /// # Errors
    /// [`FrameError`]; the stream is unusable then.
    pub async fn receive<H: DeserializeOwned>(
        &mut self,
        admit: impl FnOnce(&H, Announced) -> Result<(), String>,
    ) -> Result<Option<(H, Received)>, FrameError> {
        let mut prelude = [0; PRELUDE_BYTES];
        // A stream that ends here ends between two frames, later within one.
        let first = self.stream.read(&mut prelude).await?;
        if first == 0 {
            return Ok(None);
        }
        self.stream.read_exact(&mut prelude[first..]).await?;
        let [l0, l1, l2, l3, kind, z0, z1, z2, payload @ ..] = prelude;
        let (header_bytes, bytes) = (u32::from_le_bytes([l0, l1, l2, l3]) as usize, u64::from_le_bytes(payload));
        if header_bytes > VALUE_BYTES_MAX {
            return Err(WireError::TooLong { bytes: header_bytes }.into());
        }
        if bytes > PAYLOAD_BYTES_MAX {
            return Err(FrameError::PayloadTooLong { bytes });
        }
        let malformed = FrameError::Malformed { kind };
        let size = match kind {
            1 => 4,
            2 | 3 => 2,
            _ => 1,
        };
        let is_known = kind <= 4 && [z0, z1, z2] == [0; 3] && bytes % size == 0 && (kind > 0 || bytes == 0);
        if !is_known {
            return Err(malformed);
        }
        let count = (bytes / size) as usize;
        let announced = match kind {
            0 => Announced::Nothing,
            1..=3 => Announced::Numbers { count },
            _ => Announced::Bytes { count },
        };
        self.header.clear();
        // Memory grows with the received bytes, not with the announced length.
        (&mut self.stream).take(header_bytes as u64).read_to_end(&mut self.header).await?;
        let header = wire::decode(&self.header)?;
        admit(&header, announced).map_err(|what| FrameError::Refused { what })?;
        let received = match kind {
            0 => Received::Nothing,
            1 => Received::Numbers(self.numbers(count).await?),
            2 => Received::Numbers(self.halves::<f16>(count).await?),
            3 => Received::Numbers(self.halves::<bf16>(count).await?),
            _ => {
                let mut bytes = vec![0; count];
                self.stream.read_exact(&mut bytes).await?;
                Received::Bytes(bytes)
            }
        };
        Ok(Some((header, received)))
    }

    async fn numbers(&mut self, count: usize) -> Result<Vec<f32>, FrameError> {
        let mut numbers = vec![0.0; count];
        self.stream.read_exact(bytemuck::cast_slice_mut::<f32, u8>(&mut numbers)).await?;
        Ok(numbers)
    }

    async fn halves<T: Half>(&mut self, count: usize) -> Result<Vec<f32>, FrameError>
    where
        [T]: HalfFloatSliceExt,
    {
        let mut numbers = vec![0.0; count];
        let mut halves = vec![T::ZERO; count.min(CONVERTED_AT_ONCE)];
        for numbers in numbers.chunks_mut(CONVERTED_AT_ONCE) {
            let halves = &mut halves[..numbers.len()];
            self.stream.read_exact(bytemuck::cast_slice_mut::<T, u8>(halves)).await?;
            halves.convert_to_f32_slice(numbers);
        }
        Ok(numbers)
    }
}

/// The 16-bit floats: `f16` and `bf16`.
trait Half: bytemuck::Pod {
    const ZERO: Self;
}

impl Half for f16 {
    const ZERO: Self = f16::ZERO;
}

impl Half for bf16 {
    const ZERO: Self = bf16::ZERO;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(future)
    }

    async fn written(header: &(u64, String), payload: Payload<'_>) -> Vec<u8> {
        let mut writer = FrameWriter::new(Vec::new());
        writer.send(header, payload).await.expect("written");
        writer.stream
    }

    async fn read(bytes: &[u8]) -> Result<Option<((u64, String), Received)>, FrameError> {
        FrameReader::new(bytes).receive(|_, _| Ok(())).await
    }

    #[test]
    fn payloads_round_trip() {
        let header = (3, "three".to_owned());
        let numbers: Vec<f32> = (0..10_000).map(|i| (i as f32 - 5000.0) * 0.37).collect();
        block_on(async {
            let bytes = written(&header, Payload::Numbers(&numbers, WireType::F32)).await;
            let frame = read(&bytes).await.expect("a frame");
            assert_eq!(frame, Some((header.clone(), Received::Numbers(numbers.clone()))));
            for (wire_type, error) in [(WireType::F16, 1e-3), (WireType::Bf16, 1e-2)] {
                let bytes = written(&header, Payload::Numbers(&numbers, wire_type)).await;
                assert!(bytes.len() < numbers.len() * 2 + 100);
                let Ok(Some((_, Received::Numbers(got)))) = read(&bytes).await else { panic!("numbers") };
                assert!(got.iter().zip(&numbers).all(|(got, sent)| (got - sent).abs() <= error * sent.abs()));
            }
            let bytes = written(&header, Payload::Bytes(b"weights")).await;
            assert_eq!(
                read(&bytes).await.expect("a frame"),
                Some((header.clone(), Received::Bytes(b"weights".to_vec())))
            );
            assert_eq!(read(&[]).await.expect("an end"), None);
        });
    }

    #[test]
    fn the_payload_of_a_refused_frame_is_not_read() {
        block_on(async {
            let numbers = vec![1.0; 4];
            let bytes = written(&(1, String::new()), Payload::Numbers(&numbers, WireType::F32)).await;
            let mut reader = FrameReader::new(&bytes[..]);
            let refused = reader
                .receive(|_: &(u64, String), announced| match announced {
                    Announced::Numbers { count: 5 } => Ok(()),
                    other => Err(format!("{other:?} for 5 numbers")),
                })
                .await;
            assert!(matches!(refused, Err(FrameError::Refused { .. })));
            assert_eq!(reader.stream.len(), 16);
        });
    }

    #[test]
    fn a_frame_that_is_cut_off_or_too_long_is_an_error() {
        block_on(async {
            let bytes = written(&(1, "x".to_owned()), Payload::Bytes(&[7; 100])).await;
            for end in 1..bytes.len() {
                assert!(read(&bytes[..end]).await.is_err(), "{end}");
            }
            let mut long = bytes.clone();
            long[8..16].copy_from_slice(&(PAYLOAD_BYTES_MAX + 1).to_le_bytes());
            assert!(matches!(read(&long).await, Err(FrameError::PayloadTooLong { .. })));
            let mut long = bytes;
            long[..4].copy_from_slice(&u32::MAX.to_le_bytes());
            assert!(matches!(read(&long).await, Err(FrameError::Wire(WireError::TooLong { .. }))));
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        /// Arbitrary bytes are refused or read as a frame, without a panic.
        #[test]
        fn arbitrary_bytes_never_panic(
            mut bytes in prop::collection::vec(any::<u8>(), 0..300),
            header_bytes in 0_u32..40,
            kind in 0_u8..7,
            payload in 0_u64..300,
            is_shaped in any::<bool>(),
        ) {
            if is_shaped && bytes.len() >= PRELUDE_BYTES {
                bytes[..4].copy_from_slice(&header_bytes.to_le_bytes());
                bytes[4..8].copy_from_slice(&[kind, 0, 0, 0]);
                bytes[8..16].copy_from_slice(&payload.to_le_bytes());
            }
            let _ = block_on(read(&bytes));
        }
    }
}
