//! Generates the answers of one API call concurrently, and sends them whole or as a stream.

use super::now;
use crate::api::context::ApiContext;
use crate::api::error::ApiError;
use axum::Json;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use exo_actors::core::scheduler::FinishReason;
use exo_actors::{GenerateRequest, Generated, Generation, ModelSpec, RequestError, RunningModel, Sampled, fresh_seed};
use futures_util::stream::{SelectAll, Stream, StreamExt, select_all};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;

/// The requests of one API call, and how their answers are sent.
#[derive(Debug)]
pub(super) struct AnswerPlan {
    /// The model as the client named it.
    pub(super) name: String,
    pub(super) model: ModelSpec,
    /// One request for each answer.
    pub(super) requests: Vec<GenerateRequest>,
    /// The number of answers to each prompt. Requests with the same prompt follow each other.
    pub(super) answers_per_prompt: u32,
    pub(super) is_streamed: bool,
    pub(super) includes_usage: bool,
}

/// The JSON schema of one kind of completion.
pub(super) trait Shape: Send + 'static {
    const OBJECT: &'static str;
    const CHUNK: &'static str;
    /// The prefix of ids.
    const ID: &'static str;

    /// Prepares for `answers`, which have all started.
    fn begin(&mut self, answers: &Answers);
    /// The chunk that a stream sends for an answer before its first piece.
    fn first_chunk(&mut self, index: usize) -> Option<Value>;
    /// The chunk that a stream sends for a piece; `None`: nothing to send.
    fn chunk(&mut self, piece: &Piece, model: &RunningModel) -> Option<Value>;
    /// Adds a piece to an answer that is sent whole.
    fn collect(&mut self, piece: &Piece, model: &RunningModel);
    /// The JSON of a whole answer.
    fn choice(&mut self, answer: &FinishedAnswer) -> Value;
}

/// A piece of an answer.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) index: usize,
    pub(super) text: String,
    pub(super) sampled: Option<Sampled>,
    pub(super) finish: Option<FinishReason>,
}

/// A finished answer.
#[derive(Debug)]
pub(super) struct FinishedAnswer {
    pub(super) index: usize,
    pub(super) finish: FinishReason,
}

type Events = SelectAll<Pin<Box<dyn Stream<Item = (usize, Result<Generated, RequestError>)> + Send>>>;

/// Answers that have started.
pub(super) struct Answers {
    model: RunningModel,
    events: Events,
    count: usize,
    /// Whether the first prompt ends with `<think>`.
    opens_thought: bool,
    usage: Usage,
}

/// Token counts, as OpenAI defines them.
#[derive(Debug, Clone, Copy, Default)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    /// Tokens of the first request's prompt that were found in the prefix cache.
    cached_tokens: usize,
}

impl Usage {
    fn json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": { "cached_tokens": self.cached_tokens },
        })
    }
}

impl Answers {
    /// Starts all answers of `plan`. An error before all have started becomes the response's HTTP status.
    async fn begin(api: &ApiContext, plan: &mut AnswerPlan) -> Result<Self, ApiError> {
        let model = api.node.load(plan.model.clone()).await?;
        let requests = std::mem::take(&mut plan.requests);
        let generations: Result<Vec<Generation>, RequestError> =
            requests.into_iter().map(|request| api.node.generate_with(&model, request)).collect();
        let mut answers =
            Self { model, events: select_all([]), count: 0, opens_thought: false, usage: Usage::default() };
        for (index, mut generation) in generations?.into_iter().enumerate() {
            let Some(event) = generation.next().await else { return Err(RequestError::ShuttingDown.into()) };
            if let Generated::Started { prompt_tokens, opens_thought, .. } = event?
                && index.is_multiple_of(plan.answers_per_prompt as usize)
            {
                answers.usage.prompt_tokens += prompt_tokens.len();
                if index == 0 {
                    answers.opens_thought = opens_thought;
                }
            }
            answers.count += 1;
            answers.events.push(generation.map(move |event| (index, event)).boxed());
        }
        Ok(answers)
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Whether the answers begin within a thought: the prompt ends with `<think>`.
    pub(super) fn opens_thought(&self) -> bool {
        self.opens_thought
    }

    /// The next piece of any answer; `None` after all have ended.
    async fn next(&mut self) -> Option<Result<Piece, RequestError>> {
        loop {
            let (index, event) = self.events.next().await?;
            return Some(match event {
                Err(error) => Err(error),
                Ok(Generated::Started { .. }) => continue,
                Ok(Generated::Token { sampled, text, .. }) => {
                    self.usage.completion_tokens += 1;
                    Ok(Piece { index, text, sampled: Some(sampled), finish: None })
                }
                Ok(Generated::Finished { reason, text, cached_tokens }) => {
                    if index == 0 {
                        self.usage.cached_tokens = cached_tokens;
                    }
                    Ok(Piece { index, text, sampled: None, finish: Some(reason) })
                }
            });
        }
    }
}

/// Executes `plan`. Returns the answers in the schema `shape`.
pub(super) async fn answer<S: Shape>(
    api: &ApiContext,
    mut plan: AnswerPlan,
    mut shape: S,
) -> Result<Response, ApiError> {
    let answers = Answers::begin(api, &mut plan).await?;
    shape.begin(&answers);
    let id = format!("{}-{:016x}{:08x}", S::ID, fresh_seed(), now());
    match plan.is_streamed {
        true => Ok(stream(answers, plan, shape, id)),
        false => Ok(Json(whole(answers, plan, shape, id).await?).into_response()),
    }
}

async fn whole<S: Shape>(mut answers: Answers, plan: AnswerPlan, mut shape: S, id: String) -> Result<Value, ApiError> {
    let mut ended = Vec::new();
    while let Some(piece) = answers.next().await {
        let piece = piece?;
        shape.collect(&piece, &answers.model);
        ended.extend(piece.finish.map(|finish| FinishedAnswer { index: piece.index, finish }));
    }
    ended.sort_by_key(|answer| answer.index);
    let choices: Vec<Value> = ended.iter().map(|answer| shape.choice(answer)).collect();
    let usage = answers.usage.json();
    Ok(json!({
        "id": id, "object": S::OBJECT, "created": now(), "model": plan.name, "choices": choices, "usage": usage,
    }))
}

/// The state of a streamed response.
struct Streaming<S> {
    answers: Answers,
    plan: AnswerPlan,
    shape: S,
    id: String,
    created: u64,
    /// Events that are ready to send.
    ready: VecDeque<String>,
    /// Whether the events in `ready` are the last.
    is_over: bool,
}

fn stream<S: Shape>(answers: Answers, plan: AnswerPlan, mut shape: S, id: String) -> Response {
    let first: Vec<Value> = (0..answers.count()).filter_map(|index| shape.first_chunk(index)).collect();
    let mut streaming = Streaming { answers, plan, shape, id, created: now(), ready: VecDeque::new(), is_over: false };
    let first = first.into_iter().map(|choice| streaming.envelope(vec![choice]).to_string()).collect();
    streaming.ready = first;
    let events = futures_util::stream::unfold(streaming, |mut streaming| async move {
        let event = streaming.next().await?;
        Some((Ok::<_, Infallible>(event), streaming))
    });
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

impl<S: Shape> Streaming<S> {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(data) = self.ready.pop_front() {
                return Some(Event::default().data(data));
            }
            if self.is_over {
                return None;
            }
            match self.answers.next().await {
                Some(Ok(piece)) => {
                    let choice = self.shape.chunk(&piece, &self.answers.model);
                    let chunk = choice.map(|choice| self.envelope(vec![choice]).to_string());
                    self.ready.extend(chunk);
                }
                Some(Err(error)) => {
                    // Clients treat an event with an error as the stream's end.
                    self.end(Some(json!(ApiError::from(error).body())));
                }
                None => {
                    let usage = self.plan.includes_usage.then(|| {
                        let mut last = self.envelope(Vec::new());
                        last["usage"] = self.answers.usage.json();
                        last
                    });
                    self.end(usage);
                }
            }
        }
    }

    fn end(&mut self, last: Option<Value>) {
        self.ready.extend(last.map(|value| value.to_string()));
        self.ready.push_back("[DONE]".to_owned());
        self.is_over = true;
    }

    fn envelope(&self, choices: Vec<Value>) -> Value {
        let mut chunk = json!({
            "id": self.id, "object": S::CHUNK, "created": self.created, "model": self.plan.name, "choices": choices,
        });
        if self.plan.includes_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }
}
