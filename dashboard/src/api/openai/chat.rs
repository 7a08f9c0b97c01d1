//! `/v1/chat/completions`.

use super::answers::{AnswerPlan, Answers, FinishedAnswer, Piece, Shape};
use super::sampling::Sampling;
use crate::api::answer::{AnswerParser, Beginning, Call, Delta};
use crate::api::body::{FromBody, decode, read_value};
use crate::api::context::ApiContext;
use crate::api::error::ApiError;
use exo_actors::core::scheduler::FinishReason;
use exo_actors::{Conversation, Message, Prompt, Role, RunningModel, ToolCall, fresh_seed};
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// OpenAI's limit.
const TOP_LOGPROBS_MAX: u32 = 20;

/// A chat request. Its sampling fields are decoded separately, so that errors can name the wrong field.
#[derive(Debug, Clone)]
pub(in crate::api) struct ChatRequest {
    own: Own,
    sampling: Sampling,
}

impl FromBody for ChatRequest {
    fn read(bytes: &[u8]) -> Result<Self, ApiError> {
        let body = read_value(bytes)?;
        Ok(Self { own: decode(&body)?, sampling: decode(&body)? })
    }
}

#[derive(Debug, Clone, Deserialize)]
struct Own {
    model: String,
    messages: Vec<Spoken>,
    #[serde(default)]
    logprobs: Option<bool>,
    #[serde(default)]
    top_logprobs: Option<u32>,
    #[serde(default)]
    tools: Option<Vec<Value>>,
    #[serde(default)]
    tool_choice: Option<Value>,
    #[serde(default)]
    response_format: Option<Value>,
    #[serde(default)]
    reasoning_effort: Option<String>,
    /// Variables for the model's chat template, as in vLLM and llama.cpp.
    #[serde(default)]
    chat_template_kwargs: Option<Map<String, Value>>,
}

/// A message as clients send it.
#[derive(Debug, Clone, Deserialize)]
struct Spoken {
    role: Role,
    #[serde(default)]
    content: Option<Content>,
    #[serde(default)]
    reasoning_content: Option<String>,
    /// Another name of `reasoning_content`, which takes precedence.
    #[serde(default)]
    reasoning: Option<String>,
    #[serde(default)]
    tool_calls: Option<Vec<ToolCall>>,
    #[serde(default)]
    tool_call_id: Option<String>,
    #[serde(default)]
    name: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Value>),
}

impl Content {
    fn text(self) -> Result<String, ApiError> {
        let parts = match self {
            Self::Text(text) => return Ok(text),
            Self::Parts(parts) => parts,
        };
        let text = |part: &Value| match (part["type"].as_str(), part["text"].as_str(), part["refusal"].as_str()) {
            (Some("text"), Some(text), _) | (Some("refusal"), _, Some(text)) => Ok(text.to_owned()),
            (kind, ..) => {
                let what = format!("has a part of type `{}`; only `text` is supported", kind.unwrap_or("none"));
                Err(ApiError::bad_value("messages", what))
            }
        };
        parts.iter().map(text).collect::<Result<Vec<_>, _>>().map(|texts| texts.concat())
    }
}

impl Spoken {
    fn message(self) -> Result<Message, ApiError> {
        Ok(Message {
            role: self.role,
            content: self.content.map(Content::text).transpose()?,
            reasoning_content: self.reasoning_content.or(self.reasoning),
            tool_calls: self.tool_calls.unwrap_or_default(),
            tool_call_id: self.tool_call_id,
            name: self.name,
        })
    }
}

impl ChatRequest {
    pub(super) fn plan(self, api: &ApiContext) -> Result<(AnswerPlan, Chat), ApiError> {
        let model = api.spec(&self.own.model)?;
        let top_logprobs = self.top_logprobs()?;
        let tools = self.tools()?;
        if let Some(kind) = self.own.response_format.as_ref().and_then(|format| format["type"].as_str())
            && kind != "text"
        {
            return Err(ApiError::bad_value("response_format", format!("is `{kind}`; only `text` is supported")));
        }
        if self.own.messages.is_empty() {
            return Err(ApiError::bad_value("messages", "is empty"));
        }
        let messages = self.own.messages.into_iter().map(Spoken::message).collect::<Result<_, _>>()?;
        let mut arguments = self.own.chat_template_kwargs.unwrap_or_default();
        if let Some(effort) = self.own.reasoning_effort {
            arguments.entry("reasoning_effort").or_insert(Value::from(effort));
        }
        let chat =
            Chat { tools: tools.clone(), wants_logprobs: self.own.logprobs.unwrap_or(false), choices: Vec::new() };
        let prompt = Prompt::Chat(Conversation { messages, tools, arguments });
        let requests = self.sampling.requests(&model, &[prompt], top_logprobs, None)?;
        let answers_per_prompt = self.sampling.choices()?;
        let (is_streamed, includes_usage) = (self.sampling.is_streamed(), self.sampling.includes_usage());
        Ok((
            AnswerPlan { name: self.own.model, model, requests, answers_per_prompt, is_streamed, includes_usage },
            chat,
        ))
    }

    fn top_logprobs(&self) -> Result<u32, ApiError> {
        match (self.own.logprobs.unwrap_or(false), self.own.top_logprobs.unwrap_or(0)) {
            (_, 0) => Ok(0),
            (false, _) => Err(ApiError::bad_value("top_logprobs", "needs `logprobs` to be true")),
            (true, count) if count <= TOP_LOGPROBS_MAX => Ok(count),
            (true, count) => {
                Err(ApiError::bad_value("top_logprobs", format!("is {count}, not 0 to {TOP_LOGPROBS_MAX}")))
            }
        }
    }

    fn tools(&self) -> Result<Vec<Value>, ApiError> {
        let tools = self.own.tools.clone().unwrap_or_default();
        if tools.iter().any(|tool| !tool["function"]["name"].is_string()) {
            return Err(ApiError::bad_value("tools", "has an entry that is not a function with a name"));
        }
        match self.own.tool_choice.as_ref().map(|choice| (choice.as_str(), choice)) {
            None | Some((Some("auto"), _)) | Some((None, Value::Null)) => Ok(tools),
            Some((Some("none"), _)) => Ok(Vec::new()),
            Some(_) => {
                Err(ApiError::bad_value("tool_choice", "must be `auto` or `none`: forced calls are not supported"))
            }
        }
    }
}

/// The schema of chat completions.
#[derive(Debug)]
pub(super) struct Chat {
    tools: Vec<Value>,
    wants_logprobs: bool,
    choices: Vec<ChatChoice>,
}

/// One answer, as received so far. A stream takes its parts as they come.
#[derive(Debug)]
struct ChatChoice {
    parser: AnswerParser,
    thought: String,
    words: String,
    calls: Vec<Value>,
    /// The number of calls so far, those included that a stream has sent.
    calls_so_far: usize,
    logprobs: Vec<Value>,
}

impl ChatChoice {
    fn new(parser: AnswerParser) -> Self {
        let (calls, logprobs) = (Vec::new(), Vec::new());
        Self { parser, thought: String::new(), words: String::new(), calls, calls_so_far: 0, logprobs }
    }

    fn add(&mut self, delta: Delta) {
        match delta {
            Delta::Thought(text) => self.thought.push_str(&text),
            Delta::Words(text) => self.words.push_str(&text),
            Delta::Call(Call { name, arguments }) => {
                let id = format!("call_{:016x}{}", fresh_seed(), self.calls_so_far);
                self.calls.push(json!({
                    "id": id, "type": "function", "function": { "name": name, "arguments": arguments }
                }));
                self.calls_so_far += 1;
            }
        }
    }

    /// An answer that was cut off stays so, whatever calls it has.
    fn finish_name(&self, finish: FinishReason) -> &'static str {
        match finish {
            FinishReason::Stop if self.calls_so_far > 0 => "tool_calls",
            finish => super::finish_name(finish),
        }
    }
}

impl Shape for Chat {
    const OBJECT: &'static str = "chat.completion";
    const CHUNK: &'static str = "chat.completion.chunk";
    const ID: &'static str = "chatcmpl";

    fn begin(&mut self, answers: &Answers) {
        let beginning = if answers.opens_thought() { Beginning::InThought } else { Beginning::Plain };
        let choice = |_| ChatChoice::new(AnswerParser::new(&self.tools, beginning));
        self.choices = (0..answers.count()).map(choice).collect();
    }

    fn first_chunk(&mut self, index: usize) -> Option<Value> {
        let delta = json!({ "role": "assistant", "content": "" });
        Some(json!({ "index": index, "delta": delta, "logprobs": null, "finish_reason": null }))
    }

    fn chunk(&mut self, piece: &Piece, model: &RunningModel) -> Option<Value> {
        self.collect(piece, model);
        let choice = &mut self.choices[piece.index];
        let mut delta = Map::new();
        for (key, text) in [("reasoning_content", &mut choice.thought), ("content", &mut choice.words)] {
            if !text.is_empty() {
                delta.insert(key.to_owned(), Value::from(std::mem::take(text)));
            }
        }
        if !choice.calls.is_empty() {
            let first = choice.calls_so_far - choice.calls.len();
            let numbered = (first..).zip(choice.calls.drain(..)).map(|(index, mut call)| {
                call["index"] = Value::from(index);
                call
            });
            delta.insert("tool_calls".to_owned(), numbered.collect());
        }
        let finish = piece.finish.map(|finish| choice.finish_name(finish));
        let logprobs = std::mem::take(&mut choice.logprobs);
        if delta.is_empty() && finish.is_none() && logprobs.is_empty() {
            return None;
        }
        let logprobs = self.wants_logprobs.then(|| json!({ "content": logprobs, "refusal": null }));
        Some(json!({ "index": piece.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish }))
    }

    fn collect(&mut self, piece: &Piece, model: &RunningModel) {
        let choice = &mut self.choices[piece.index];
        if let Some(sampled) = piece.sampled.as_ref().filter(|_| self.wants_logprobs) {
            let entry = |id: u32, logprob: f32| {
                let bytes = model.token_bytes(id);
                json!({ "token": String::from_utf8_lossy(bytes), "logprob": logprob, "bytes": bytes })
            };
            let mut own = entry(sampled.token, sampled.logprob);
            let top: Vec<Value> = sampled.top_logprobs.iter().map(|&(id, logprob)| entry(id, logprob)).collect();
            own["top_logprobs"] = Value::from(top);
            choice.logprobs.push(own);
        }
        let mut deltas = choice.parser.push(&piece.text);
        if piece.finish.is_some() {
            deltas.extend(choice.parser.finish());
        }
        deltas.into_iter().for_each(|delta| choice.add(delta));
    }

    fn choice(&mut self, answer: &FinishedAnswer) -> Value {
        let choice = &mut self.choices[answer.index];
        let finish = choice.finish_name(answer.finish);
        let (thought, words) = (std::mem::take(&mut choice.thought), std::mem::take(&mut choice.words));
        let (calls, logprobs) = (std::mem::take(&mut choice.calls), std::mem::take(&mut choice.logprobs));
        let content = if words.is_empty() && !calls.is_empty() { Value::Null } else { Value::from(words) };
        let mut message = json!({ "role": "assistant", "content": content, "refusal": null });
        if !thought.is_empty() {
            message["reasoning_content"] = Value::from(thought);
        }
        if !calls.is_empty() {
            message["tool_calls"] = Value::from(calls);
        }
        let logprobs = self.wants_logprobs.then(|| json!({ "content": logprobs, "refusal": null }));
        json!({ "index": answer.index, "message": message, "logprobs": logprobs, "finish_reason": finish })
    }
}
