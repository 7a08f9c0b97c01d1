//! The context of an instance: the most tokens of one sequence, and what set that number.
//!
//! ```text
//! a request's spec, the model's own context ─► wanted ─leader: memory of the devices─► Context of the deployment
//! ```
//! A request that names a context gets that context or a refusal. Otherwise an instance gets the largest context, up to
//! the model's own, that needs no more devices than [`DEFAULT_TOKENS`] would. It gives the memory for the tokens beyond
//! [`DEFAULT_TOKENS`] back where another model, or the repair of this one, needs it.

use exo_engines::decoder::pages_for;
use serde::{Deserialize, Serialize};

/// The context that decides how many devices a model takes when the request names none. Chats seldom need more.
pub const DEFAULT_TOKENS: u32 = 4096;
/// Sequences of up to [`DEFAULT_TOKENS`] that the cache holds at once. More shorter ones fit.
const SEQUENCES: u32 = 4;

/// The context of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Context {
    /// The most tokens of a prompt and its answer together.
    pub tokens: u32,
    /// The model's own context, in tokens.
    pub model_tokens: u32,
    /// What set `tokens`.
    pub limit: ContextLimit,
}

/// What set the context of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContextLimit {
    /// The request.
    Request,
    /// The model's own context.
    Model,
    /// The context up to which a model with LongRoPE computes positions as it did before it was extended. A longer one
    /// changes the answers to short prompts, too.
    LongRope,
    /// The memory of the devices.
    Memory,
}

impl Context {
    /// The largest context that an instance may get: of `requested` tokens, or of as many as the model has. `original`
    /// is the context above which LongRoPE changes the positions.
    pub fn largest(requested: Option<u32>, model_tokens: u32, original: Option<u32>) -> Self {
        let (tokens, limit) = match (requested, original.filter(|&original| original < model_tokens)) {
            (Some(requested), _) => (requested, ContextLimit::Request),
            (None, Some(original)) => (original, ContextLimit::LongRope),
            (None, None) => (model_tokens, ContextLimit::Model),
        };
        Self { tokens, model_tokens, limit }
    }

    /// This context, limited to `tokens` for lack of memory.
    #[must_use]
    pub fn limited(self, tokens: u32) -> Self {
        if tokens < self.tokens { Self { tokens, limit: ContextLimit::Memory, ..self } } else { self }
    }

    /// This context, limited to [`DEFAULT_TOKENS`] unless the request named it.
    #[must_use]
    pub fn least(self) -> Self {
        if self.limit == ContextLimit::Request { self } else { self.limited(DEFAULT_TOKENS) }
    }

    /// Pages of each shard's cache: for one whole context, and for several sequences of up to [`DEFAULT_TOKENS`].
    pub fn cache_pages(&self) -> u32 {
        let several = pages_for(self.tokens.min(DEFAULT_TOKENS)).saturating_mul(SEQUENCES);
        pages_for(self.tokens).max(several)
    }

    /// What a user can do to get a longer context.
    pub fn remedy(&self) -> &'static str {
        match self.limit {
            ContextLimit::Model => "shorten the prompt, or take a model with a longer context",
            ContextLimit::Memory => "shorten the prompt, or stop other models and programs before the model is loaded",
            ContextLimit::Request | ContextLimit::LongRope => {
                "shorten the prompt, or load the model with a longer context"
            }
        }
    }
}

/// Writes the number of tokens and what set it: `8192 tokens, as much as memory permits (the model's own: 131072)`.
impl std::fmt::Display for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { tokens, model_tokens, limit } = self;
        match limit {
            ContextLimit::Model => write!(f, "{tokens} tokens, the model's own"),
            ContextLimit::Request => write!(f, "{tokens} tokens, as requested (the model's own: {model_tokens})"),
            ContextLimit::LongRope => {
                write!(f, "{tokens} tokens, the model's before LongRoPE (up to {model_tokens} on request)")
            }
            ContextLimit::Memory => {
                write!(f, "{tokens} tokens, as much as memory permits (the model's own: {model_tokens})")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each limit gives, and what it says.
    #[test]
    fn contexts_say_what_set_them() {
        let largest = |requested, original| Context::largest(requested, 131_072, original);
        let texts = [
            (largest(None, None), "131072 tokens, the model's own"),
            (largest(Some(9000), None), "9000 tokens, as requested (the model's own: 131072)"),
            (largest(Some(9000), Some(4096)), "9000 tokens, as requested (the model's own: 131072)"),
            (largest(None, Some(8192)), "8192 tokens, the model's before LongRoPE (up to 131072 on request)"),
            (largest(None, None).limited(10_240), "10240 tokens, as much as memory permits (the model's own: 131072)"),
            (largest(None, None).least(), "4096 tokens, as much as memory permits (the model's own: 131072)"),
            (largest(Some(9000), None).least(), "9000 tokens, as requested (the model's own: 131072)"),
            (Context::largest(None, 2048, None).least(), "2048 tokens, the model's own"),
        ];
        for (context, text) in texts {
            assert_eq!(context.to_string(), text);
        }
    }

    /// The cache holds one whole context, and at least four short sequences.
    #[test]
    fn the_cache_holds_a_whole_context() {
        for (tokens, pages) in
            [(64, 4 * 2), (4096, 512), (9000, 512), (16_384, 512), (20_000, 625), (u32::MAX, 1 << 27)]
        {
            assert_eq!(Context::largest(Some(tokens), u32::MAX, None).cache_pages(), pages, "{tokens}");
        }
    }
}
