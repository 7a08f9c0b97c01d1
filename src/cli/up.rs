//! `exo-node up`: starts a node that keeps running and serves the HTTP API.

use super::descriptors::raise_limit;
use super::engine_args::EngineArguments;
use super::events::print_events;
use super::hint::hint;
use super::model_args::{absolute_with_recipe, expand_home, note_path};
use super::outcome::Outcome;
use super::progress::Display;
use super::secrets::{self, SecretArgument};
use crate::api::{ApiConfig, listen};
use crate::config::data_folder;
use crate::{
    ActivationBits, ClusterSettings, Discover, JoinToken, KvElement, ModelSpec, Node, NodeBuilder, NodeHandle,
    PORT_DEFAULT, PlanError, RequestError, Speculation, Split, StartError, WireType,
};
use anyhow::Context;
use clap::Parser;
use exo_net::NetworkError;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// The default address of the HTTP API.
pub(super) const API_DEFAULT: &str = "127.0.0.1:52415";
/// Connections over TCP at once, if there are descriptors enough: more than a household has clients.
const CONNECTIONS_MAX: usize = 1024;
/// The wait for a node that a split names.
const RETRY_LOAD_AFTER: Duration = Duration::from_secs(2);
/// Longer than a pause in a conversation; short enough that yesterday's models do not fill the memory.
const UNLOAD_AFTER_DEFAULT: &str = "30m";

/// The arguments of `up`. They derive `Parser`, since a call without a command runs `up` with the defaults.
#[derive(Debug, Parser)]
#[command(after_help = "Examples:
  exo-node up
  exo-node up smollm2 --unload-after never
  ssh desktop exo-node token | exo-node up --join -
  exo-node up --api 0.0.0.0:52415 --api-key-file ~/exo.key
  curl http://127.0.0.1:52415/v1/chat/completions -d \\
    '{\"model\": \"smollm2\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'")]
pub(super) struct UpArguments {
    /// Models to load at the start; others are loaded when a request names them
    models: Vec<String>,
    /// Split the model by hand: a node's name or id and its layers, from the first layers to the last
    #[arg(long, value_name = "NODE:FIRST-LAST,…")]
    split: Option<Split>,
    /// Context length of the models: tokens of prompt and answer together [default: the model's, as far as memory
    /// allows]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
    /// Type of these models' cached keys and values: f16, f32, or q8_0 for half the memory and a little less accuracy
    /// [default: f16]
    #[arg(long, value_name = "TYPE")]
    kv_cache: Option<KvElement>,
    /// Bits of activations in matrix products: 8 computes prompts and batches 1.5 to 1.8 times as fast as 16, a little
    /// less accurately [default: 16]
    #[arg(long, value_name = "BITS")]
    activations: Option<ActivationBits>,
    /// How to guess tokens ahead, which are checked together: lookup repeats what followed the same tokens earlier in
    /// the text, none is off. The answers are the same
    #[arg(long, value_name = "METHOD", default_value_t)]
    speculate: Speculation,
    /// Smaller model with the same tokens that guesses tokens ahead for these models where the text does not repeat
    #[arg(long, value_name = "MODEL")]
    draft: Option<String>,
    /// TCP address of the HTTP API, or `none` for no TCP
    #[arg(long, value_name = "ADDR:PORT", default_value = API_DEFAULT)]
    api: String,
    /// Key that all TCP clients must send, or - to read it from stdin; required unless the API listens on loopback
    #[arg(long, value_name = "KEY", env = "EXO_API_KEY", hide_env_values = true)]
    api_key: Option<SecretArgument>,
    /// File that holds the API key; takes precedence over --api-key and EXO_API_KEY
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Origin of a page or app that may use the API, such as app://obsidian.md, or * for all; may be repeated
    #[arg(long = "allow-origin", value_name = "ORIGIN", value_parser = origin)]
    allowed_origins: Vec<String>,
    /// Address of a reverse proxy: exempt from the limit of 64 connections from one address; may be repeated
    #[arg(long = "proxy", value_name = "IP")]
    proxies: Vec<IpAddr>,
    /// How long an unused model stays in memory: 90s, 30m, 2h, or `never` to keep it for ever
    #[arg(long, value_name = "TIME", default_value = UNLOAD_AFTER_DEFAULT)]
    unload_after: String,
    /// Most memory of all models together, in gigabytes [default: what is free]
    #[arg(long, value_name = "GB")]
    memory: Option<f64>,
    /// UDP address for other members, or `none` for no network [default: [::]:52416, or any port where
    /// that one is taken]
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<String>,
    /// Token of the cluster to join, which `exo-node token` prints on a member; - reads it from stdin. Stored for later
    /// starts
    #[arg(long, value_name = "TOKEN", env = "EXO_JOIN", hide_env_values = true)]
    join: Option<SecretArgument>,
    /// File that holds the token; takes precedence over --join and EXO_JOIN
    #[arg(long, value_name = "FILE")]
    join_file: Option<PathBuf>,
    /// Address of a member that discovery does not find
    #[arg(long = "peer", value_name = "ADDR:PORT")]
    peers: Vec<SocketAddr>,
    /// Do not look for members on the local network, and do not announce this node
    #[arg(long)]
    no_discovery: bool,
    /// Name that other members show for this node [default: the machine's name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Number type of activations sent to other machines: f32, or f16 or bf16 for half the bytes and less accuracy
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    wire_dtype: WireType,
    #[command(flatten)]
    engines: EngineArguments,
    /// Folder of this node's identity and settings; models are in the shared cache
    #[arg(long, value_name = "FOLDER")]
    data_dir: Option<PathBuf>,
}

pub(super) async fn run(arguments: UpArguments) -> anyhow::Result<Outcome> {
    let notes = Display::notes();
    let mut builder = Node::builder().on_fetch(move |progress| notes.fetch(progress));
    if let Some(idle) = arguments.unload_after()? {
        builder = builder.unload_after(idle);
    }
    if let Some(bytes) = arguments.memory_bytes()? {
        builder = builder.memory_limit_bytes(bytes);
    }
    builder = arguments.engines.apply(builder);
    if let Some(name) = &arguments.name {
        builder = builder.name(name.clone());
    }
    if [&arguments.join, &arguments.api_key].into_iter().flatten().filter(|secret| secret.is_stdin()).count() > 1 {
        anyhow::bail!("only one of --join and --api-key can be read from stdin");
    }
    let join = secrets::read(arguments.join.as_ref(), arguments.join_file.as_deref())?;
    let join = join.map(|token| token.parse::<JoinToken>()).transpose()?;
    let data_dir = data_folder(arguments.data_dir.as_deref())?;
    let models = arguments.specs()?;
    arguments.models.iter().for_each(|name| note_path(name));
    let config = ApiConfig {
        listen: arguments.listen()?,
        socket_folder: Some(data_dir.clone()),
        api_key: secrets::read(arguments.api_key.as_ref(), arguments.api_key_file.as_deref())?,
        named_models: models.iter().flat_map(names).collect(),
        allowed_origins: arguments.allowed_origins.iter().cloned().collect(),
        connections_max: connections_max(raise_limit()),
        proxies: arguments.proxies.iter().copied().collect(),
    };
    // The sockets come first: a second node with the same identity would confuse the members, and a node whose API has
    // no address must not join.
    let listeners = listen(config).await?;
    // From here on SIGTERM shuts the node down cleanly.
    let mut terminated = signal(SignalKind::terminate())?;
    let node = arguments.start(builder.data_dir(&data_dir), join).await?;
    let served = listeners.serve(&node);
    if let Some(error) = &served.socket_error {
        eprintln!("warning: {error}; other commands of this machine do not reach this node");
    }
    eprintln!("exo-node {}, node {}", env!("CARGO_PKG_VERSION"), node.id());
    let status = node.status().await?;
    for address in &status.addresses {
        eprintln!("`{}` listens for members on {address}", status.name);
    }
    if arguments.is_alone(&status.addresses) {
        eprintln!("warning: this machine has no address that others reach: only nodes on it find this one");
    }
    if let Some(address) = served.address {
        eprintln!("API on http://{address}/v1");
    }
    let events = print_events(node.clone());
    let loading = async {
        for model in models {
            load(&node, model).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = loading => {}
        // The node has stopped by itself.
        () = events => {}
        _ = tokio::signal::ctrl_c() => {}
        _ = terminated.recv() => {}
    }
    eprintln!("stopping");
    served.stop();
    node.shutdown().await;
    Ok(Outcome::Done)
}

/// Loads a model. A split may name nodes that have not joined yet: waits for them.
async fn load(node: &NodeHandle, model: ModelSpec) {
    let mut missing = None;
    while let Err(error) = node.load(model.clone()).await {
        match &error {
            RequestError::Plan(PlanError::NoSuchNode { node }) => {
                if missing.as_ref() != Some(node) {
                    eprintln!("{model} waits for the node `{node}`");
                    missing = Some(node.clone());
                }
                tokio::time::sleep(RETRY_LOAD_AFTER).await;
            }
            // The node can still serve other models.
            _ => {
                let error = anyhow::Error::from(error);
                return eprintln!("error: {model}: {error}\n  remedy: {}", hint(&error).unwrap_or_default());
            }
        }
    }
}

/// Connections over TCP at once: at most half of the descriptors, since models, members and the owner need some, too.
fn connections_max(descriptors: u64) -> usize {
    usize::try_from(descriptors / 2).unwrap_or(usize::MAX).min(CONNECTIONS_MAX)
}

/// The names of a spec's models.
fn names(spec: &ModelSpec) -> impl Iterator<Item = String> {
    std::iter::once(spec.model.clone()).chain(spec.draft_model().map(|draft| draft.model))
}

/// An origin as browsers send it: the scheme and the host in lower case, with the port, and no path.
fn origin(text: &str) -> Result<String, String> {
    let origin = text.trim_end_matches('/').to_lowercase();
    let authority = origin.split_once("://").map_or("", |(_, authority)| authority);
    let is_origin = !authority.is_empty() && !authority.contains('/') && origin.bytes().all(|b| b.is_ascii_graphic());
    match is_origin || text == "*" {
        true => Ok(if text == "*" { text.to_owned() } else { origin }),
        false => Err("neither SCHEME://HOST nor `*`".to_owned()),
    }
}

impl UpArguments {
    /// The models to load at the start.
    fn specs(&self) -> anyhow::Result<Vec<ModelSpec>> {
        if self.split.is_some() && self.models.len() != 1 {
            anyhow::bail!("--split names the layers of one model, and {} are given", self.models.len());
        }
        let draft = self.draft.as_deref().map(absolute_with_recipe);
        let spec = |name: &String| ModelSpec {
            split: self.split.clone(),
            context_tokens: self.context,
            kv_cache: self.kv_cache,
            activations: self.activations,
            speculation: self.speculate,
            draft: draft.clone().filter(|draft| ModelSpec::new(draft) != ModelSpec::new(expand_home(name))),
            ..ModelSpec::new(expand_home(name))
        };
        Ok(self.models.iter().map(spec).collect())
    }

    /// Starts the node, as a member of its cluster unless `--listen` is `none`.
    async fn start(&self, builder: NodeBuilder, join: Option<JoinToken>) -> anyhow::Result<NodeHandle> {
        let settings = |listen| ClusterSettings {
            listen,
            join: join.clone(),
            peers: self.peers.clone(),
            discover: if self.no_discovery { Discover::Off } else { Discover::Multicast },
            wire_type: self.wire_dtype,
        };
        let any = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        match self.listen.as_deref() {
            Some("none") => Ok(builder.start().await?),
            Some(address) => {
                let address =
                    address.parse().with_context(|| format!("--listen {address}: neither ADDR:PORT nor `none`"))?;
                Ok(builder.cluster(settings(address)).start().await?)
            }
            None => match builder.clone().cluster(settings(any(PORT_DEFAULT))).start().await {
                // Another node of this machine has the port; members find this one by discovery, or from each other.
                Err(StartError::Network(NetworkError::Bind(_))) => {
                    Ok(builder.cluster(settings(any(0))).start().await?)
                }
                started => Ok(started?),
            },
        }
    }

    /// Whether the node listens on all interfaces in vain: none but loopback has an address.
    fn is_alone(&self, addresses: &[SocketAddr]) -> bool {
        self.listen.is_none() && !addresses.is_empty() && addresses.iter().all(|address| address.ip().is_loopback())
    }

    fn listen(&self) -> anyhow::Result<Option<SocketAddr>> {
        match self.api.as_str() {
            "none" => Ok(None),
            address => {
                Ok(Some(address.parse().with_context(|| format!("--api {address}: neither ADDR:PORT nor `none`"))?))
            }
        }
    }

    fn unload_after(&self) -> anyhow::Result<Option<Duration>> {
        match self.unload_after.as_str() {
            "never" => Ok(None),
            time => {
                let idle = humantime::parse_duration(time);
                Ok(Some(idle.with_context(|| format!("--unload-after {time}: neither a time nor `never`"))?))
            }
        }
    }

    fn memory_bytes(&self) -> anyhow::Result<Option<u64>> {
        match self.memory {
            None => Ok(None),
            Some(gigabytes) if gigabytes > 0.0 && gigabytes < 1e6 => Ok(Some((gigabytes * 1e9) as u64)),
            Some(gigabytes) => anyhow::bail!("--memory {gigabytes}: not between 0 and 1000000 gigabytes"),
        }
    }
}
