//! `exo-node run`: answers one prompt.

use super::model_args::ModelArguments;
use super::outcome::Outcome;
use super::progress::Display;
use super::report::{StageReport, milliseconds, rate};
use super::session::{Answered, Answering, Session};
use super::shown::ShownAnswer;
use crate::{
    Answerer, FinishReason, GenerateRequest, Generated, Message, Prompt, RequestError, Role, SamplingParams, fresh_seed,
};
use clap::Args;
use serde::Serialize;
use std::io::{IsTerminal, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  exo-node run smollm2 \"Why is the sky blue?\"
  exo-node run gemma3-270m --raw --max-tokens 40 \"Once upon a time\"
  git log -5 | exo-node run qwen3-4b --system \"Summarise.\" -
  exo-node run smollm2 --json --seed 7 --temperature 0.8 \"Hello\" | jq .text")]
pub(super) struct RunArguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Prompt; `-`, or no prompt where stdin is not a terminal, reads it from stdin
    prompt: Option<String>,
    /// Continue the prompt as it is, without the model's chat template
    #[arg(long)]
    raw: bool,
    /// System prompt, before the prompt
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Most tokens to generate [default: until the model ends the answer, or the context is full]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,
    /// Sampling temperature: 0 always takes the likeliest token; higher values vary more
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f32,
    /// Sample from the K likeliest tokens; 0: from all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: u32,
    /// Sample from the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f32,
    /// Sample from tokens with at least this share of the likeliest token's probability
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    min_p: f32,
    /// Penalty on earlier tokens: above 1 makes them less likely; 1: no change
    #[arg(long, value_name = "X", default_value_t = 1.0, allow_negative_numbers = true)]
    repeat_penalty: f32,
    /// Text that ends the answer; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Seed of the sampling: the same seed gives the same tokens [default: random]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Report the log-probabilities of each token and of the N likeliest tokens (with --json)
    #[arg(long, value_name = "N")]
    logprobs: Option<u32>,
    /// Print only one JSON object on stdout
    #[arg(long)]
    json: bool,
}

/// The JSON object of `--json`.
#[derive(Debug, Serialize)]
struct Report {
    text: String,
    prompt_token_ids: Vec<u32>,
    token_ids: Vec<u32>,
    logprobs: Vec<TokenReport>,
    finish_reason: FinishReason,
    prompt_tokens: usize,
    generated_tokens: usize,
    /// Milliseconds to load the model; `None` where a running node answered.
    load_ms: Option<f64>,
    ttft_ms: f64,
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
    model: String,
    /// The type of the weights; `None` where the answer did not begin.
    quantization: Option<String>,
    stages: Vec<StageReport>,
}

#[derive(Debug, Serialize)]
struct TokenReport {
    id: u32,
    token: String,
    logprob: f32,
    top_logprobs: Vec<TopReport>,
}

#[derive(Debug, Serialize)]
struct TopReport {
    id: u32,
    token: String,
    logprob: f32,
}

/// An answer, as received so far. Times count from the request.
#[derive(Debug, Default)]
struct CollectedAnswer {
    /// What answers; `None` before its head accepted the request.
    by: Option<Box<Answerer>>,
    text: String,
    /// How the answer is shown; `None`: not at all, or as it is.
    shown: Option<ShownAnswer>,
    prompt_tokens: Vec<u32>,
    tokens: Vec<TokenReport>,
    finish: Option<FinishReason>,
    first_token: Option<Duration>,
    last_token: Option<Duration>,
}

pub(super) async fn run(arguments: RunArguments) -> anyhow::Result<Outcome> {
    let display = Arc::new(if arguments.json { Display::quiet() } else { Display::new() });
    let prompt = read_prompt(arguments.prompt.as_deref())?;
    let params = arguments.params();
    params.check().map_err(RequestError::from)?;
    if prompt.is_empty() {
        return Err(RequestError::BadPrompt { what: "it is empty".to_owned() }.into());
    }
    let Some(session) = Session::open(&arguments.model, &display).await? else {
        return Ok(Outcome::Interrupted);
    };
    if session.is_base_model() && !arguments.raw && !arguments.json {
        eprintln!("{} is a base model without a chat template: it continues the raw prompt", arguments.model.model);
    }
    let started = Instant::now();
    let is_chat = !arguments.raw && !arguments.json;
    let mut answer = CollectedAnswer { shown: is_chat.then(ShownAnswer::new), ..CollectedAnswer::default() };
    let answering = async {
        let generation = session.generate(arguments.request(prompt, params)).await?;
        answer.collect(generation, started, !arguments.json).await
    };
    let interrupted = tokio::select! {
        outcome = answering => { outcome?; false }
        _ = tokio::signal::ctrl_c() => true,
    };
    let answered = session.answered(&arguments.model.spec(), answer.by.as_deref()).await;
    if arguments.json && !interrupted {
        println!("{}", serde_json::to_string(&answer.report(answered?, arguments.logprobs.is_some()))?);
    } else if !arguments.json {
        println!();
        if let Ok(answered) = answered {
            eprintln!("{}", answer.summary(&answered));
        }
    }
    session.close().await;
    Ok(if interrupted { Outcome::Interrupted } else { Outcome::Done })
}

fn read_prompt(argument: Option<&str>) -> anyhow::Result<String> {
    match argument {
        Some("-") => {}
        Some(prompt) => return Ok(prompt.to_owned()),
        None if std::io::stdin().is_terminal() => {
            return Err(RequestError::BadPrompt { what: "no prompt is given".to_owned() }.into());
        }
        None => {}
    }
    let mut prompt = String::new();
    let limit = exo_engines::tokenizer::TEXT_BYTES_MAX as u64 + 1;
    std::io::stdin().take(limit).read_to_string(&mut prompt)?;
    Ok(prompt)
}

impl RunArguments {
    fn params(&self) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repeat_penalty,
            seed: self.seed.unwrap_or_else(fresh_seed),
            top_logprobs: self.logprobs.unwrap_or(0),
            ..SamplingParams::greedy()
        }
    }

    fn request(&self, prompt: String, params: SamplingParams) -> GenerateRequest {
        let prompt = if self.raw {
            Prompt::Text(prompt)
        } else {
            let system = self.system.clone().map(|content| Message::new(Role::System, content));
            let user = Message::new(Role::User, prompt);
            Prompt::Chat(system.into_iter().chain([user]).collect::<Vec<_>>().into())
        };
        GenerateRequest {
            model: self.model.spec(),
            prompt,
            params,
            max_tokens: self.max_tokens,
            stop: self.stop.clone(),
        }
    }
}

impl CollectedAnswer {
    async fn collect(&mut self, mut generation: Answering, started: Instant, shows: bool) -> anyhow::Result<()> {
        while let Some(event) = generation.next().await {
            match event? {
                Generated::Started { by, prompt_tokens, .. } => {
                    (self.by, self.prompt_tokens) = (Some(by), prompt_tokens);
                }
                Generated::Token { sampled, names, text } => {
                    let now = started.elapsed();
                    self.first_token.get_or_insert(now);
                    self.last_token = Some(now);
                    self.add(&text, shows)?;
                    let mut names = names.into_iter();
                    let token = names.next().unwrap_or_default();
                    let top = sampled.top_logprobs.iter().zip(names);
                    self.tokens.push(TokenReport {
                        id: sampled.token,
                        token,
                        logprob: sampled.logprob,
                        top_logprobs: top.map(|(&(id, logprob), token)| TopReport { id, token, logprob }).collect(),
                    });
                }
                Generated::Finished { reason, text, .. } => {
                    self.add(&text, shows)?;
                    self.shown.as_mut().map_or(Ok(()), ShownAnswer::finish)?;
                    self.finish = Some(reason);
                    return Ok(());
                }
            }
        }
        Err(RequestError::ShuttingDown.into())
    }

    fn add(&mut self, text: &str, shows: bool) -> std::io::Result<()> {
        self.text.push_str(text);
        match &mut self.shown {
            Some(shown) => shown.push(text),
            None if shows && !text.is_empty() => {
                let mut out = std::io::stdout().lock();
                out.write_all(text.as_bytes())?;
                out.flush()
            }
            None => Ok(()),
        }
    }

    fn decode_rate(&self) -> f64 {
        match (self.first_token, self.last_token) {
            (Some(first), Some(last)) => rate(self.tokens.len().saturating_sub(1), last - first),
            _ => 0.0,
        }
    }

    fn report(self, answered: Answered, wants_logprobs: bool) -> Report {
        let first = self.first_token.unwrap_or_default();
        Report {
            decode_tokens_per_s: self.decode_rate(),
            token_ids: self.tokens.iter().map(|token| token.id).collect(),
            prompt_tokens: self.prompt_tokens.len(),
            generated_tokens: self.tokens.len(),
            load_ms: answered.load.map(milliseconds),
            ttft_ms: milliseconds(first),
            prefill_tokens_per_s: rate(self.prompt_tokens.len(), first),
            text: self.text,
            prompt_token_ids: self.prompt_tokens,
            logprobs: if wants_logprobs { self.tokens } else { Vec::new() },
            finish_reason: self.finish.unwrap_or(FinishReason::Stop),
            model: answered.model,
            quantization: answered.quantization,
            stages: answered.stages,
        }
    }

    fn summary(&self, answered: &Answered) -> String {
        let mut devices: Vec<&str> = answered.stages.iter().map(|stage| stage.device.as_str()).collect();
        let shards = devices.len();
        devices.dedup();
        let loaded = match answered.load {
            Some(load) => format!("loaded in {:.0} ms", milliseconds(load)),
            None => "answered by the running node".to_owned(),
        };
        let on = match shards {
            // The head is on another node, whose report has not arrived yet.
            0 => String::new(),
            1 => format!(", on {} in 1 shard", devices.join(", ")),
            _ => format!(", on {} in {shards} shards", devices.join(", ")),
        };
        format!(
            "{} prompt + {} generated tokens, first after {:.0} ms, then {:.1} tokens/s{on}, {loaded}",
            self.prompt_tokens.len(),
            self.tokens.len(),
            milliseconds(self.first_token.unwrap_or_default()),
            self.decode_rate(),
        )
    }
}
