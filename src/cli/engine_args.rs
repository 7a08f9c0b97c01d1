//! The arguments about the engines of a node in this process.

use crate::{Isolation, NodeBuilder};
use clap::Args;

/// How the engines of this process run.
#[derive(Debug, Clone, Args)]
pub(super) struct EngineArguments {
    /// Threads of each engine of this process [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(super) threads: Option<u32>,
    /// Run each engine in a process of its own, those of the CPU, too [default: all but the native CPU's]
    #[arg(long)]
    isolate: bool,
    /// Run all engines but those of GPUs in this process: a crash of one ends the node, and a hang holds its memory
    #[arg(long, conflicts_with = "isolate")]
    no_isolate: bool,
}

impl EngineArguments {
    /// Whether the engines of this process are to differ from the usual.
    pub(super) fn is_given(&self) -> bool {
        self.threads.is_some() || self.isolate || self.no_isolate
    }

    pub(super) fn apply(&self, mut builder: NodeBuilder) -> NodeBuilder {
        if let Some(threads) = self.threads {
            builder = builder.threads(threads as usize);
        }
        match (self.isolate, self.no_isolate) {
            (true, _) => builder.isolation(Isolation::All),
            (_, true) => builder.isolation(Isolation::None),
            _ => builder,
        }
    }
}
