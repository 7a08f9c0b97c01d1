//! The OpenCL engine: the whole decoder of a shard on a GPU of any vendor, by kernels in OpenCL C.
//!
//! ```text
//! platforms ─listing.rs─► devices, with their reports (report.rs) ─factory.rs─► engine
//! files ─coded.rs─► packed rows, or ─tiles.rs─► tiles ─weights.rs─► device memory
//! a step: rows ─► kernels (rows.cl, products.cl or tiles.cl, attention.cl), queued in order ─► scores
//!         begin    mix, feed_forward, add                                           finish: the last wait
//! ```
//! Two tiers compute products (`tier.rs`). The portable one needs OpenCL 1.2, and double precision only where
//! single-precision division is not rounded correctly. The matrix tier multiplies by tensor cores. Both compute the
//! [arithmetic](crate::arithmetic) with its operations in its order, so tokens equal those of the CPU engine to the
//! bit. A device without denormal numbers, or with neither a correctly rounded division nor double precision, cannot do
//! that, and is refused.
//!
//! A driver can crash or hang, so the engine runs in a process of its own
//! ([`ProcessNeed::Required`](crate::engine::ProcessNeed)). `libOpenCL.so.1` is loaded when devices are looked for; the
//! program needs it neither to build nor to start.

mod attention;
mod backend;
mod cache;
mod coded;
mod device;
mod exactness;
mod factory;
mod fault;
mod limits;
mod listing;
mod pace;
mod products;
mod programs;
mod queue;
mod report;
mod rows;
mod scratch;
mod tier;
mod tiles;
mod weights;

pub use factory::OpenClFactory;
pub use rows::OpenClBackend;
