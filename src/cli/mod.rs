//! The command line: parses arguments, calls a node, and prints results for people or scripts.
//!
//! stdout has only the answer (or, with `--json`, one JSON value); progress, summaries and errors go to stderr. Exit
//! codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

mod bare_engine;
mod bench;
mod chat;
mod client;
mod descriptors;
mod doctor;
mod drain;
mod engine_args;
mod events;
mod evict;
mod gpu;
mod hint;
mod model_args;
mod models;
mod outcome;
mod perplexity;
mod plan;
mod profile;
mod progress;
mod pull;
mod report;
mod run;
mod secrets;
mod session;
mod shown;
mod status;
mod token;
mod up;

use clap::{Parser, Subcommand};
use outcome::Outcome;
use std::io::IsTerminal;
use std::process::ExitCode;

/// Every machine you own, one LLM inference cluster.
#[derive(Debug, Parser)]
#[command(name = "exo-node", version, max_term_width = 100)]
struct Arguments {
    /// What to do [default: up]
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a node that keeps running and serves the HTTP API
    Up(Box<up::UpArguments>),
    /// Answer a prompt with a model
    Run(Box<run::RunArguments>),
    /// Chat with a model interactively
    Chat(Box<chat::ChatArguments>),
    /// Show the status of the running node and its cluster
    Status(status::StatusArguments),
    /// Print the token with which another machine joins this one's cluster
    Token(token::TokenArguments),
    /// Move the running node's work to other members, so that it can be stopped
    Drain(drain::DrainArguments),
    /// Remove a member from the cluster: no member admits it any more
    Evict(evict::EvictArguments),
    /// Show where a model would be placed, and why
    Plan(Box<plan::PlanArguments>),
    /// Fetch a model's files to this machine
    Pull(pull::PullArguments),
    /// List the models of the catalogue
    Models(models::ModelsArguments),
    /// Check this machine for all that a node needs, and say how to mend what is missing
    Doctor(doctor::DoctorArguments),
    /// Measure a model's speed on this machine
    Bench(bench::BenchArguments),
    /// Measure how well a model predicts a text
    Perplexity(perplexity::PerplexityArguments),
    /// Serve one engine to the node that starts this process
    #[command(hide = true)]
    EngineWorker,
}

/// Parses the arguments of this process, and runs their command. Returns the exit code.
pub fn main() -> ExitCode {
    crate::run_worker_if_asked();
    let arguments = Arguments::parse();
    let command = arguments.command.unwrap_or_else(|| Command::Up(Box::new(up::UpArguments::parse_from(["up"]))));
    start_logging(match command {
        // Events are told in words; the log has what else is wrong.
        Command::Up(_) => "warn",
        // Other commands print their own messages.
        _ => "off",
    });
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&anyhow::anyhow!("the async runtime could not be started: {error}")),
    };
    let outcome = runtime.block_on(async {
        match command {
            Command::Up(arguments) => up::run(*arguments).await,
            Command::Run(arguments) => run::run(*arguments).await,
            Command::Chat(arguments) => chat::run(*arguments).await,
            Command::Status(arguments) => status::run(arguments).await,
            Command::Token(arguments) => token::run(arguments).await,
            Command::Drain(arguments) => drain::run(arguments).await,
            Command::Evict(arguments) => evict::run(arguments).await,
            Command::Plan(arguments) => plan::run(*arguments).await,
            Command::Pull(arguments) => pull::run(arguments).await,
            Command::Models(arguments) => models::run(&arguments),
            Command::Doctor(arguments) => doctor::run(arguments).await,
            Command::Bench(arguments) => bench::run(arguments).await,
            Command::Perplexity(arguments) => perplexity::run(arguments).await,
            Command::EngineWorker => {
                Err(anyhow::anyhow!("a node starts this command for its engines; it has no use by hand"))
            }
        }
    });
    // The process exits without waiting for downloads and engines.
    runtime.shutdown_background();
    match outcome {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::ChecksFailed) => ExitCode::FAILURE,
        Ok(Outcome::Interrupted) => ExitCode::from(130),
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error}");
    for cause in error.chain().skip(1) {
        eprintln!("  because: {cause}");
    }
    if let Some(hint) = hint::hint(error) {
        eprintln!("  remedy: {hint}");
    }
    ExitCode::FAILURE
}

/// Sends logs to stderr, filtered by `EXO_LOG` (else by `default`), and as JSON with `EXO_LOG_FORMAT=json`.
fn start_logging(default: &str) {
    use tracing_subscriber::EnvFilter;
    let wanted = std::env::var("EXO_LOG");
    let (is_wanted, filter) = (wanted.is_ok(), wanted.unwrap_or_else(|_| default.to_owned()));
    // ractor_cluster warns of every closed session; exo logs lost peers itself. `EXO_LOG` can turn the warnings on.
    let filter = EnvFilter::try_new(format!("ractor_cluster=error,{filter}"));
    let filter = filter.unwrap_or_else(|_| EnvFilter::new("ractor_cluster=error,info"));
    let colours = std::io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours);
    if std::env::var("EXO_LOG_FORMAT").is_ok_and(|format| format == "json") {
        builder.json().init();
    } else if is_wanted {
        builder.init();
    } else {
        // Lines for people: times and places in the code are for those who ask for a log.
        builder.without_time().with_target(false).init();
    }
}
