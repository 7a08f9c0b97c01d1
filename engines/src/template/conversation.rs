//! The input of a chat template: messages, tools, and the template's own arguments.
//!
//! Field names are OpenAI's, which templates read.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A conversation that a model is to continue.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Conversation {
    /// The messages, oldest first.
    pub messages: Vec<Message>,
    /// Functions that the model may call, as JSON schemas.
    pub tools: Vec<Value>,
    /// Further variables of the template, such as `enable_thinking`.
    pub arguments: Map<String, Value>,
}

impl Conversation {
    /// Messages as templates read them. Reasoning appears under both its names.
    pub(super) fn values(&self) -> Vec<minijinja::Value> {
        let value = |message: &Message| match (&message.reasoning_content, serde_json::to_value(message)) {
            (Some(thought), Ok(Value::Object(fields))) => {
                let mut both = Map::from_iter([("thinking".to_owned(), Value::from(thought.as_str()))]);
                both.extend(fields);
                minijinja::Value::from_serialize(both)
            }
            _ => minijinja::Value::from_serialize(message),
        };
        self.messages.iter().map(value).collect()
    }
}

impl From<Vec<Message>> for Conversation {
    fn from(messages: Vec<Message>) -> Self {
        Self { messages, ..Self::default() }
    }
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The author.
    pub role: Role,
    /// The text; may be empty.
    #[serde(default)]
    pub content: String,
    /// The model's reasoning before this message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// Functions that the model called.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// The id of the call that a tool's message answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// The name of the tool or the speaker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl Message {
    /// Creates a message of text only.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: content.into(),
            reasoning_content: None,
            tool_calls: Vec::new(),
            tool_call_id: None,
            name: None,
        }
    }
}

/// The author of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The operator's instructions; `developer` is read as the same role.
    #[serde(alias = "developer")]
    System,
    /// The user.
    User,
    /// The model.
    Assistant,
    /// A function that the model called; the message is its result.
    Tool,
}

/// A function call of the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    /// The call's id, to which a tool's message refers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The kind of the call, `function` by default; `type` in JSON.
    #[serde(rename = "type", default = "function")]
    pub kind: String,
    /// The called function.
    pub function: FunctionCall,
}

fn function() -> String {
    "function".to_owned()
}

/// The name of the called function, and its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionCall {
    /// The function's name.
    pub name: String,
    /// An object, as templates expect it. OpenAI's clients send JSON text, which is parsed.
    #[serde(deserialize_with = "object_or_text")]
    pub arguments: Value,
}

fn object_or_text<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Value, D::Error> {
    let value = Value::deserialize(deserializer)?;
    match &value {
        Value::String(text) => Ok(serde_json::from_str(text).unwrap_or(value)),
        _ => Ok(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_may_come_as_text() {
        let call = r#"{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": [1, 2]}"}}"#;
        let call: ToolCall = serde_json::from_str(call).expect("a call");
        assert_eq!(call.function.arguments, serde_json::json!({"a": [1, 2]}));
        let odd = r#"{"function": {"name": "f", "arguments": "not json"}}"#;
        let odd: ToolCall = serde_json::from_str(odd).expect("a call");
        assert_eq!((odd.kind.as_str(), odd.function.arguments), ("function", Value::from("not json")));
    }
}
