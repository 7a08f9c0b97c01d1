//! The chat templates of one model.

use crate::template::{ChatTemplate, TemplateError};

/// A model's chat templates. One that cannot be compiled keeps its error, which is returned when a chat needs it.
#[derive(Debug, Default)]
pub(super) struct Templates {
    default: Option<Result<ChatTemplate, TemplateError>>,
    /// The template of conversations with tools, where it is another.
    with_tools: Option<Result<ChatTemplate, TemplateError>>,
}

impl Templates {
    /// Compiles the sources. A blank source is no template. `special` has the texts of the tokens that begin and end a
    /// text.
    pub(super) fn new(
        default: Option<&str>,
        with_tools: Option<&str>,
        (bos, eos): (Option<&str>, Option<&str>),
    ) -> Self {
        let compiled = |source: Option<&str>| {
            let source = source.filter(|source| !source.trim().is_empty())?;
            Some(ChatTemplate::new(source, bos, eos))
        };
        Self { default: compiled(default), with_tools: compiled(with_tools) }
    }

    /// The template of a conversation with or without tools.
    pub(super) fn find(&self, tools: Tools) -> Option<Result<&ChatTemplate, &TemplateError>> {
        let with_tools = self.with_tools.as_ref().filter(|_| tools == Tools::Given);
        Some(with_tools.or(self.default.as_ref())?.as_ref())
    }
}

/// Whether a conversation offers tools to the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tools {
    /// It has tools.
    Given,
    /// It has none.
    Absent,
}
