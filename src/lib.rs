//! exo as a library: embeds a node in another program.
//!
//! ```no_run
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! use exo::{GenerateRequest, Generated, ModelSpec, Node, Prompt, SamplingParams};
//!
//! let node = Node::builder().threads(2).start().await?;
//! let mut answer = node.generate(GenerateRequest {
//!     model: ModelSpec::new("smollm2"),
//!     prompt: Prompt::Text("The sky is".to_owned()),
//!     params: SamplingParams::greedy(),
//!     max_tokens: Some(16),
//!     stop: Vec::new(),
//! })?;
//! while let Some(event) = answer.next().await {
//!     if let Generated::Token { text, .. } = event? {
//!         print!("{text}");
//!     }
//! }
//! node.shutdown().await;
//! # Ok(())
//! # }
//! ```
//! A [`NodeHandle`] generates answers, reports the node's status and the facts that change it, and shuts the node down.
//! Dropping a [`Generation`] cancels it. `examples/embed.rs` is a small service that adds its own actor.

/// The HTTP API, for embedders that serve it.
#[cfg(feature = "http")]
pub mod api {
    pub use exo_dashboard::api::*;
}
#[cfg(feature = "cli")]
pub mod cli;
mod cluster;
mod config;
mod error;
mod node;
mod worker;

pub use cluster::{ClusterSettings, PORT_DEFAULT};
pub use config::{ConfigError, Directories};
pub use error::StartError;
pub use exo_actors::core::clique::Outside;
pub use exo_actors::core::members::{DeviceOffer, MemberReport, OwnedInstance};
pub use exo_actors::core::node_status::{Fact, NodeStatus};
pub use exo_actors::core::plan::{Link, Placement, PlanError, Policy, Preview, PreviewOutcome, Split, Stage};
pub use exo_actors::core::scheduler::FinishReason;
pub use exo_actors::core::spec::{InstanceId, Model, Speculation};
pub use exo_actors::core::status::{InstanceStatus, Load, Machine, Phase, Totals};
pub use exo_actors::core::watchdog::HangTimeouts;
pub use exo_actors::models::{CATALOGUE, ModelError, Origin, Progress, ResolvedModel};
pub use exo_actors::{
    Answerer, Conversation, FunctionCall, GenerateRequest, Generated, Generation, Lagged, Message, ModelSpec,
    NodeHandle, Prompt, RequestError, Role, RunningModel, Sampled, SamplingParams, Subscription, ToolCall, fresh_seed,
};
pub use exo_engines::engine::{ActivationBits, DeviceId, DeviceReport, EngineFactory, KvElement};
pub use exo_engines::model::Recipe;
pub use exo_net::{ClusterSecret, Discover, Identity, JoinToken, NodeId, WireType};
pub use node::{Node, NodeBuilder};
pub use worker::{Isolation, run_worker_if_asked};

/// The engine port, for embedders that add their own engine.
pub mod engine {
    pub use exo_engines::engine::*;
    pub use exo_engines::model::WeightSource;
    pub use exo_engines::{EngineError, ErrorClass};
}
