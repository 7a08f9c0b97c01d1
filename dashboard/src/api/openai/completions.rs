//! `/v1/completions`: continues plain text.

use super::answers::{AnswerPlan, Answers, FinishedAnswer, Piece, Shape};
use super::sampling::Sampling;
use crate::api::body::{FromBody, decode, read_value};
use crate::api::context::ApiContext;
use crate::api::error::ApiError;
use exo_actors::{Prompt, RunningModel};
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// OpenAI's limit for older models. Clients rarely request more.
const LOGPROBS_MAX: u32 = 20;
/// The most prompts of one call: each counts as one of the node's requests.
const PROMPTS_MAX: usize = 64;

/// A completion request. Its sampling fields are decoded separately, so that errors can name the wrong field.
#[derive(Debug, Clone)]
pub(in crate::api) struct CompletionRequest {
    own: Own,
    sampling: Sampling,
}

impl FromBody for CompletionRequest {
    fn read(bytes: &[u8]) -> Result<Self, ApiError> {
        let body = read_value(bytes)?;
        Ok(Self { own: decode(&body)?, sampling: decode(&body)? })
    }
}

#[derive(Debug, Clone, Deserialize)]
struct Own {
    model: String,
    /// Without a prompt, the model begins a text.
    #[serde(default)]
    prompt: Option<Prompts>,
    #[serde(default)]
    logprobs: Option<u32>,
    #[serde(default)]
    echo: Option<bool>,
    #[serde(default)]
    suffix: Option<String>,
    #[serde(default)]
    best_of: Option<u32>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

impl Prompts {
    fn all(self) -> Vec<Prompt> {
        match self {
            Self::Text(text) => vec![Prompt::Text(text)],
            Self::Texts(texts) => texts.into_iter().map(Prompt::Text).collect(),
            Self::Tokens(tokens) => vec![Prompt::Tokens(tokens)],
            Self::TokenLists(lists) => lists.into_iter().map(Prompt::Tokens).collect(),
        }
    }
}

impl CompletionRequest {
    pub(super) fn plan(self, api: &ApiContext) -> Result<(AnswerPlan, Completions), ApiError> {
        let model = api.spec(&self.own.model)?;
        let choices = self.sampling.choices()?;
        if self.own.echo == Some(true) {
            return Err(ApiError::bad_value("echo", "is not supported: answers do not repeat the prompt"));
        }
        if self.own.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::bad_value("suffix", "is not supported: answers only continue the prompt"));
        }
        if self.own.best_of.is_some_and(|best_of| best_of != choices) {
            return Err(ApiError::bad_value("best_of", "differs from `n`: all answers are returned"));
        }
        if self.own.logprobs.is_some_and(|count| count > LOGPROBS_MAX) {
            return Err(ApiError::bad_value("logprobs", format!("exceeds the limit of {LOGPROBS_MAX}")));
        }
        let prompts = self.own.prompt.unwrap_or(Prompts::Text(String::new())).all();
        if prompts.is_empty() || prompts.len() > PROMPTS_MAX {
            let what = format!("has {} prompts, not 1 to {PROMPTS_MAX}", prompts.len());
            return Err(ApiError::bad_value("prompt", what));
        }
        // 16 is OpenAI's default for `max_tokens`.
        let requests = self.sampling.requests(&model, &prompts, self.own.logprobs.unwrap_or(0), Some(16))?;
        let shape = Completions { wants_logprobs: self.own.logprobs.is_some(), choices: Vec::new() };
        let (is_streamed, includes_usage) = (self.sampling.is_streamed(), self.sampling.includes_usage());
        Ok((
            AnswerPlan {
                name: self.own.model,
                model,
                requests,
                answers_per_prompt: choices,
                is_streamed,
                includes_usage,
            },
            shape,
        ))
    }
}

/// The schema of text completions.
#[derive(Debug)]
pub(super) struct Completions {
    wants_logprobs: bool,
    choices: Vec<CompletionChoice>,
}

#[derive(Debug, Default)]
struct CompletionChoice {
    text: String,
    logprobs: Logprobs,
    /// The number of characters of all tokens so far.
    offset: usize,
}

/// Parallel lists with one entry per token, as in OpenAI's older API.
#[derive(Debug, Default)]
struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Map<String, Value>>,
    text_offset: Vec<usize>,
}

impl Shape for Completions {
    const OBJECT: &'static str = "text_completion";
    const CHUNK: &'static str = "text_completion";
    const ID: &'static str = "cmpl";

    fn begin(&mut self, answers: &Answers) {
        self.choices = (0..answers.count()).map(|_| CompletionChoice::default()).collect();
    }

    fn first_chunk(&mut self, _: usize) -> Option<Value> {
        None
    }

    fn chunk(&mut self, piece: &Piece, model: &RunningModel) -> Option<Value> {
        self.take(piece, model);
        if piece.text.is_empty() && piece.finish.is_none() && !self.wants_logprobs {
            return None;
        }
        let logprobs = self.logprobs(piece.index);
        let finish = piece.finish.map(super::finish_name);
        Some(json!({ "index": piece.index, "text": piece.text, "logprobs": logprobs, "finish_reason": finish }))
    }

    fn collect(&mut self, piece: &Piece, model: &RunningModel) {
        self.take(piece, model);
        self.choices[piece.index].text.push_str(&piece.text);
    }

    fn choice(&mut self, answer: &FinishedAnswer) -> Value {
        let logprobs = self.logprobs(answer.index);
        let text = std::mem::take(&mut self.choices[answer.index].text);
        json!({
            "index": answer.index, "text": text, "logprobs": logprobs, "finish_reason": super::finish_name(answer.finish)
        })
    }
}

impl Completions {
    fn take(&mut self, piece: &Piece, model: &RunningModel) {
        let Some(sampled) = piece.sampled.as_ref().filter(|_| self.wants_logprobs) else { return };
        let CompletionChoice { logprobs, offset, .. } = &mut self.choices[piece.index];
        let name = |id: u32| String::from_utf8_lossy(model.token_bytes(id)).into_owned();
        let token = name(sampled.token);
        logprobs.text_offset.push(*offset);
        *offset += token.chars().count();
        logprobs.tokens.push(token);
        logprobs.token_logprobs.push(sampled.logprob);
        // Several tokens may have one text, as parts of characters do: the likeliest comes first, and stays.
        let mut top = Map::new();
        for &(id, logprob) in &sampled.top_logprobs {
            top.entry(name(id)).or_insert(Value::from(logprob));
        }
        logprobs.top_logprobs.push(top);
    }

    fn logprobs(&mut self, index: usize) -> Value {
        if !self.wants_logprobs {
            return Value::Null;
        }
        let Logprobs { tokens, token_logprobs, top_logprobs, text_offset } =
            std::mem::take(&mut self.choices[index].logprobs);
        json!({
            "tokens": tokens, "token_logprobs": token_logprobs, "top_logprobs": top_logprobs, "text_offset": text_offset
        })
    }
}
