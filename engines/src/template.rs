//! Chat templates: Jinja as Hugging Face's `apply_chat_template` runs it, under limits.
//!
//! A template comes with a model and is not trusted: its fuel, output and stack are limited, and it has no access to
//! the disk or the clock (`strftime_now` formats a time that the caller passes). minijinja's `~` and `==` on lists that
//! hold one list many times are not limited: ARCHITECTURE.md has the consequences.

use chrono::NaiveDateTime;
use conversation::{CallArguments, NullContent};
use minijinja::{Environment, Error, ErrorKind, Template, Value};
use parking_lot::Mutex;
use serde_json::Value as Json;
use std::io;
use std::sync::Arc;

/// The fuel of one rendering. An instruction costs 1, and so do 64 bytes of a value; text that is printed from a list
/// or float, or written by `tojson`, costs 1 more for 16 bytes. A short conversation takes some thousands.
const FUEL: u64 = 500_000;
/// Fuel for each message besides: templates look at each message several times, and some at all others, too.
const FUEL_PER_MESSAGE: u64 = 20_000;
/// Fuel for each byte of the conversation: a byte that is copied or written as JSON costs up to a sixteenth each time.
const FUEL_PER_BYTE: u64 = 1;
/// The most fuel of a rendering, which bounds all bytes that it makes to 3 GB.
const FUEL_MAX: u64 = 48_000_000;
/// Stack of a rendering. Every eight instructions can nest a list in another, and comparing or dropping the lists takes
/// one to three calls for each level. The stack occupies memory only as far as it is used.
const STACK_BYTES: usize = 256 << 20;
/// No real template has a longer source.
const SOURCE_BYTES_MAX: usize = 1 << 20;
/// No model's context fits a longer prompt.
const OUTPUT_BYTES_MAX: usize = 16 << 20;

mod conversation;
mod environment;
mod python;

pub use conversation::{Conversation, FunctionCall, Message, Role, ToolCall};

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos: String,
    eos: String,
    null_content: NullContent,
    now: Arc<Mutex<NaiveDateTime>>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("source", &self.source).finish_non_exhaustive()
    }
}

/// The reason why a template cannot be compiled or rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template cannot be compiled, or failed while it rendered.
    #[error("the chat template is malformed: {what}")]
    Malformed {
        /// A description of the fault.
        what: String,
    },
    /// The template called `raise_exception`, mostly because it does not support the order of roles.
    #[error("the chat template refuses the conversation: {what}")]
    Refused {
        /// The template's own message.
        what: String,
    },
    /// The rendering takes more fuel than the conversation's length allows, or makes a text longer than 16 MiB.
    #[error("the chat template takes too long or writes too much")]
    Limit,
    /// The rendering thread cannot be started.
    #[error("cannot start a thread for the chat template: {what}")]
    NoThread {
        /// The operating system's message.
        what: String,
    },
}

impl ChatTemplate {
    /// Compiles `source`, of at most 1 MiB. `bos` and `eos` are the texts of these tokens.
    ///
    /// # Errors
    /// [`TemplateError::Malformed`], with the faulty line, or for a source that is too long.
    pub fn new(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self, TemplateError> {
        if source.len() > SOURCE_BYTES_MAX {
            return Err(TemplateError::Malformed {
                what: format!("its source has {} bytes; the limit is {SOURCE_BYTES_MAX}", source.len()),
            });
        }
        let now = Arc::new(Mutex::new(NaiveDateTime::default()));
        let mut environment = environment::python_like(&now).map_err(|e| malformed(&e))?;
        let template = environment::prepared(source);
        environment.add_template_owned("chat", template).map_err(|e| malformed(&e))?;
        Ok(Self {
            environment,
            source: source.to_owned(),
            bos: bos.unwrap_or_default().to_owned(),
            eos: eos.unwrap_or_default().to_owned(),
            null_content: NullContent::for_template(source),
            now,
        })
    }

    /// The template's source, unchanged.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the template uses tools.
    pub fn takes_tools(&self) -> bool {
        self.source.contains("tools")
    }

    /// Renders the prompt for the next answer to `conversation`, at the local time `now`.
    ///
    /// # Errors
    /// [`TemplateError`] if the template refuses, fails or exceeds its limits, or if its thread cannot be started.
    pub fn render(&self, conversation: &Conversation, now: NaiveDateTime) -> Result<String, TemplateError> {
        *self.now.lock() = now;
        let thread = std::thread::Builder::new().name("template".to_owned()).stack_size(STACK_BYTES);
        std::thread::scope(|scope| {
            let rendering = thread.spawn_scoped(scope, || self.render_here(conversation));
            let rendering = rendering.map_err(|e| TemplateError::NoThread { what: e.to_string() })?;
            rendering.join().unwrap_or_else(|_| Err(TemplateError::Malformed { what: "it panicked".to_owned() }))
        })
    }

    /// Renders as most templates need calls and missing content. Where the template fails, tries the other forms.
    fn render_here(&self, conversation: &Conversation) -> Result<String, TemplateError> {
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel(conversation)));
        let template = environment.get_template("chat").map_err(|e| malformed(&e))?;
        let render = |calls, content| self.render_with(&template, conversation, calls, content);
        let first = render(CallArguments::Objects, self.null_content);
        let Err(TemplateError::Malformed { .. }) = first else { return first };
        let has_calls = conversation.messages.iter().any(|message| !message.tool_calls.is_empty());
        let lacks_content = conversation.messages.iter().any(|message| message.content.is_none());
        let calls = if has_calls { &CallArguments::ALL[..] } else { &CallArguments::ALL[..1] };
        let contents = if lacks_content { &NullContent::ALL[..] } else { &NullContent::ALL[..1] };
        let ways = calls.iter().flat_map(|&calls| contents.iter().map(move |&content| (calls, content)));
        let mut others = ways.filter(|&way| way != (CallArguments::Objects, self.null_content));
        others.find_map(|(calls, content)| render(calls, content).ok()).map_or(first, Ok)
    }

    fn render_with(
        &self,
        template: &Template<'_, '_>,
        conversation: &Conversation,
        calls: CallArguments,
        null_content: NullContent,
    ) -> Result<String, TemplateError> {
        let messages = conversation.values(calls, null_content);
        let tools = match conversation.tools.is_empty() {
            true => Value::from(()),
            false => conversation.tools.iter().map(python::from_json).collect::<Vec<Value>>().into(),
        };
        let mut variables = conversation.arguments.clone();
        for (name, value) in [
            ("documents", Json::Null),
            ("add_generation_prompt", Json::from(true)),
            ("bos_token", Json::from(self.bos.as_str())),
            ("eos_token", Json::from(self.eos.as_str())),
        ] {
            variables.entry(name).or_insert(value);
        }
        let context = minijinja::context! { messages, tools, ..python::from_fields(&variables) };
        let mut output = Bounded(Vec::new());
        match template.render_captured_to(context, &mut output) {
            Ok(_) => String::from_utf8(output.0).map_err(|e| TemplateError::Malformed { what: e.to_string() }),
            Err(error) => Err(render_error(&error)),
        }
    }
}

/// The fuel for a conversation: bounded, and enough for any number of messages.
fn fuel(conversation: &Conversation) -> u64 {
    // A conversation that cannot be serialised is not rendered either.
    let bytes = serde_json::to_vec(conversation).map_or(0, |json| json.len() as u64);
    FUEL_MAX.min(FUEL + FUEL_PER_MESSAGE * conversation.messages.len() as u64 + FUEL_PER_BYTE * bytes)
}

fn malformed(error: &Error) -> TemplateError {
    TemplateError::Malformed { what: error.to_string() }
}

fn render_error(error: &Error) -> TemplateError {
    match error.kind() {
        ErrorKind::OutOfFuel | ErrorKind::WriteFailure => TemplateError::Limit,
        ErrorKind::InvalidOperation if error.detail().is_some_and(|d| d.starts_with(environment::RAISED)) => {
            let what = error.detail().unwrap_or_default().trim_start_matches(environment::RAISED);
            TemplateError::Refused { what: what.to_owned() }
        }
        _ => malformed(error),
    }
}

/// A buffer that fails if more is written than a prompt can have.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_BYTES_MAX {
            return Err(io::Error::other("the output is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String, TemplateError> {
        let messages = vec![Message::new(Role::User, "Hi <b>"), Message::new(Role::Assistant, " yes ")];
        let now =
            chrono::NaiveDate::from_ymd_opt(2026, 3, 1).unwrap_or_default().and_hms_opt(9, 5, 0).unwrap_or_default();
        ChatTemplate::new(source, Some("<s>"), Some("</s>"))?.render(&messages.into(), now)
    }

    #[test]
    fn templates_render_as_hugging_face_renders_them() {
        let chat = "{% for m in messages %}\n    {% if m['role'] == 'user' %}\n[{{ m.content.strip() }}]\n    {% endif %}\n{% endfor %}{{ bos_token }}";
        assert_eq!(render(chat), Ok("[Hi <b>]\n<s>".to_owned()));
        assert_eq!(
            render("{{ messages[1]['content'] | trim }}|{{ strftime_now('%d %b %Y') }}"),
            Ok("yes|01 Mar 2026".to_owned())
        );
        assert_eq!(
            render("{{ {'a': [1, 'é<'], 'b': none} | tojson }}"),
            Ok("{\"a\": [1, \"é<\"], \"b\": null}".to_owned())
        );
        assert_eq!(render("{%- generation %}x{% endgeneration -%}"), Ok("x".to_owned()));
    }

    /// Templates append a past call's arguments as text, or walk them; they ask for missing content, or append it.
    #[test]
    fn calls_and_missing_content_come_as_a_template_needs_them() {
        let arguments = serde_json::json!({ "a": 1 });
        let function = FunctionCall { name: "f".to_owned(), arguments };
        let call = ToolCall { id: None, kind: "function".to_owned(), function };
        let message = Message { content: None, tool_calls: vec![call], ..Message::new(Role::Assistant, "") };
        let conversation = Conversation::from(vec![message]);
        let with = |body: &str| {
            let source = format!("{{% for m in messages %}}{body}{{% endfor %}}");
            let template = ChatTemplate::new(&source, None, None)?;
            template.render(&conversation, NaiveDateTime::default())
        };
        let arguments = "m.tool_calls[0].function.arguments";
        assert_eq!(with(&format!("{{{{ 'x' + {arguments} }}}}")), Ok("x{\"a\":1}".to_owned()));
        assert_eq!(
            with(&format!("{{% for k, v in {arguments}|items %}}{{{{ k }}}}={{{{ v }}}}{{% endfor %}}")),
            Ok("a=1".to_owned())
        );
        assert_eq!(with("{{ m.content is none }}"), Ok("True".to_owned()));
        assert_eq!(with("[{{ m.content }}]"), Ok("[]".to_owned()));
        assert_eq!(with("{{ '[' + m.content + ']' }}"), Ok("[]".to_owned()));
    }

    #[test]
    fn a_long_conversation_of_calls_renders() {
        let source = "{% for m in messages %}{% for n in messages[::-1] %}{% if n.role == 'user' %}{% set q = loop.index %}{% endif %}{% endfor %}{{ m.role }}: {{ m.content or (m.tool_calls | tojson) }}\n{% endfor %}";
        let function =
            || FunctionCall { name: "f".to_owned(), arguments: serde_json::json!({ "text": "x".repeat(2000) }) };
        let call = || ToolCall { id: None, kind: "function".to_owned(), function: function() };
        let mut messages = vec![Message::new(Role::User, "Hi")];
        for _ in 0..300 {
            messages.push(Message { content: None, tool_calls: vec![call()], ..Message::new(Role::Assistant, "") });
            messages.push(Message::new(Role::Tool, "y".repeat(2000)));
        }
        let template = ChatTemplate::new(source, None, None).expect("it compiles");
        let text = template.render(&messages.into(), NaiveDateTime::default()).expect("it renders");
        assert!(text.len() > 300 * 4000);
    }

    #[test]
    fn a_text_that_doubles_is_stopped() {
        let doubled =
            "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
        assert_eq!(render(doubled), Err(TemplateError::Limit));
        assert_eq!(render("{{ 'abc'.count('') }}{{ ''[::-1] }}"), Ok("4".to_owned()));
        let long = "{% set ns = namespace(x='a') %}{% for i in range(20) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
        for made in [
            "ns.x | replace('a', ns.x)",
            "ns.x | wordwrap(1, wrapstring=ns.x)",
            "ns.x.join(ns.x)",
            "ns.x | list | join(ns.x)",
            "(ns.x | replace('a', '\t')).expandtabs(4096)",
            "(ns.x | replace('a', '\n')) | indent(256, true, true)",
        ] {
            assert!(render(&format!("{long}{{{{ {made} }}}}")).is_err(), "{made}");
        }
        assert_eq!(render(&format!("{long}{{{{ ns.x | wordwrap(1) | length }}}}")), Ok("2097151".to_owned()));
        assert_eq!(render(&format!("{long}{{{{ ns.x.strip(ns.x) }}}}")), Ok(String::new()));
        let wide = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
        for made in ["ns.x is lower", "[ns.x] | join(',')", "ns.x | upper", "ns.x | trim"] {
            let rendered = render(&format!("{wide}{{{{ {made} }}}}"));
            assert!(rendered.is_err() || rendered == Ok("False".to_owned()), "{made}: {rendered:?}");
        }
    }

    #[test]
    fn refusals_and_mistakes_are_different_errors() {
        let refusal = render("{{ raise_exception('roles must alternate') }}");
        assert_eq!(refusal, Err(TemplateError::Refused { what: "roles must alternate".to_owned() }));
        assert!(matches!(render("{% for %}"), Err(TemplateError::Malformed { .. })));
        assert!(matches!(render("{{ messages.nothing.more }}"), Err(TemplateError::Malformed { .. })));
        assert!(matches!(render("{{ strftime_now('%Q') }}"), Err(TemplateError::Malformed { .. })));
    }

    #[test]
    fn endless_templates_are_stopped() {
        let forever = "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}";
        assert_eq!(render(forever), Err(TemplateError::Limit));
        assert!(render("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").is_err());
        assert!(render("{{ '%1000000000s' | format(1) }}").is_err());
        // Lists nested as deep as the fuel allows.
        let deep = "{% set ns = namespace(x=[], y=[]) %}{% for i in range(45000) %}{% set ns.x = [ns.x] %}{% endfor %}";
        assert!(render(&format!("{deep}{{{{ ns.x }}}}")).is_err());
        assert!(render(&format!("{deep}{{{{ ns.x | tojson }}}}")).is_err());
        assert_eq!(render(deep), Ok(String::new()));
        let compared = deep.replace("45000", "20000").replace("ns.x = [ns.x]", "ns.x = [ns.x] %}{% set ns.y = [ns.y]");
        assert_eq!(render(&format!("{compared}{{{{ ns.x == ns.y }}}}")), Ok("True".to_owned()));
        let wide = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
        assert!(render(&format!("{wide}{{{{ ns.x }}}}")).is_err());
        assert!(render(&format!("{wide}{{{{ ns.x | tojson }}}}")).is_err());
    }
}
